"""Every family, tiny and random: the five equalities that say an exit is what it claims to be.

replay == truncated == native      features of one encode are those of the model that really has fewer blocks
default == plain                   the engine's answers are those of `generate`, token for token, at every exit
mixed == alone                     a batch of exits, images of any size and questions answers as one by one
padding changes nothing            a long neighbour does not reach a short row's logits
LoRA stays off the tower
"""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exitwise import Sample, UserError, encode, exit_at, exit_features
from exitwise.alignment.policy import Policy, without_encoder
from exitwise.engines import whole
from exitwise.engines.prefix import (
    Decoding,
    ExitRequest,
    answer_wave,
    make_plan,
    make_rows,
    memory_limits,
    perplexities,
)
from exitwise.model.costs import PROMPT, exit_costs, request_inputs
from exitwise.model.exits import replay
from exitwise.model.families import FAMILIES, find_blocks, truncated_config
from tests.families import BLOCKS, NOT_HERE, TINY
from tests.model.conftest import family_model

DECODING = Decoding(8)
QUESTIONS = (("a", "Hi.", "wide"), ("b", "What is this, and why?", "tall"), ("c", "é?", ""), ("d", "Hi.", "small"))
EXITS = range(BLOCKS + 1)


@pytest.fixture(scope="module")
def features(vlm, images):
    table = {name: exit_features(vlm, image, EXITS) for name, image in images.items()}
    return lambda name, exit: table[name][exit]


@pytest.fixture(scope="module")
def rows(vlm, images):
    requests = [ExitRequest(Sample(key, text, "benign", name), exit) for key, text, name in QUESTIONS for exit in EXITS]
    layouts = {name: layout(vlm, image) for name, image in images.items()}
    return make_rows(vlm, requests, layouts.__getitem__)


def layout(vlm, image):
    return 16 if vlm.family.counted else vlm.picture(image).layout


def answers(vlm, rows, features, batch_size, decoding=DECODING):
    found = {}
    for wave in make_plan(rows, batch_size, 10**6):
        for _, completions in answer_wave(vlm, wave, features, decoding):
            found |= {(c.sample, c.exit): c.tokens for c in completions}
    assert len(found) == len(rows)
    return found


def plain(vlm, text, image, exit):
    """`generate` as a user would call it, pixels in."""
    chat = vlm.chat(text, with_image=image is not None)
    special = not chat.startswith(vlm.tokenizer.bos_token)
    if image is None:
        inputs = vlm.tokenizer(chat, return_tensors="pt", add_special_tokens=special)
        inputs = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        if vlm.name == "paligemma":  # a prompt is read both ways, with an image or without
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    else:
        inputs = dict(vlm.processor(images=[image], text=[chat], return_tensors="pt", add_special_tokens=special))
        inputs.pop("labels", None)
    with exit_at(vlm, exit), torch.inference_mode():
        found = vlm.model.generate(**inputs, max_new_tokens=DECODING.max_new_tokens, do_sample=False)
    tokens = found[0, inputs["input_ids"].shape[1] :].tolist()
    stop = vlm.tokenizer.eos_token_id
    return tuple(tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)


def truncated(vlm, exit):
    """The model whose encoder really has `exit` blocks, with the same weights; None where transformers has none."""
    config = truncated_config(vlm.model.config, exit)
    if config is None:
        return None
    model = type(vlm.model)(config).eval()
    weights = vlm.model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    assert len(find_blocks(model)) == exit
    return model


@torch.inference_mode()
def test_costs_are_those_of_the_truncated_model(vlm, images):
    """Parameters and FLOPs of a request at every exit, counted on the model that really has so many blocks."""
    inputs = request_inputs(vlm, PROMPT, images["tall"])
    for row in exit_costs(vlm, range(1, BLOCKS + 1), image=images["tall"], repetitions=0)["exits"]:
        model = truncated(vlm, int(row["exit"]))
        assert row["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=True, logits_to_keep=1)
        assert row["flops"]["total"] == counter.get_total_flops()


@torch.inference_mode()
def test_replay_is_the_truncated_and_the_native_model(vlm, images):
    cut = {exit: truncated(vlm, exit) for exit in EXITS}
    assert set(EXITS) - {exit for exit, model in cut.items() if model is None} >= set(range(1, BLOCKS + 1))
    for image in images.values():
        inputs = vlm.picture(image).inputs
        states = encode(vlm, inputs)
        assert len(states) == BLOCKS + 1
        for exit in EXITS:
            found = replay(vlm, inputs, states, exit)[0]
            with exit_at(vlm, exit):
                torch.testing.assert_close(found, joined(vlm.family, vlm.model, inputs), rtol=0, atol=2e-5)
            if cut[exit] is not None:
                native = joined(vlm.family, cut[exit], inputs)
                taps_left = found[:, : native.shape[1]]  # taps of blocks that are gone are gone, too
                assert not found[:, native.shape[1] :].any()
                torch.testing.assert_close(taps_left, native, rtol=0, atol=2e-5)
            if hasattr(vlm.model.config, "vision_feature_layer"):
                layer = {"vision_feature_layer": [exit]}
                if vlm.name == "internvl":  # takes one layer, and does not ask the encoder for the states by itself
                    layer = {"vision_feature_layer": exit, "output_hidden_states": True}
                native = vlm.model.get_image_features(**inputs, **layer).pooler_output
                torch.testing.assert_close(found, torch.cat(list(native)), rtol=0, atol=2e-5)


@torch.inference_mode()
def test_internvl_that_takes_an_inner_layer(images):
    """Its own setting, -1, normalises the last state; others do not."""
    vlm = TINY["internvl"](feature_layer=-2)
    assert vlm.default_exit == BLOCKS - 1
    inputs = vlm.picture(images["wide"]).inputs
    found = exit_features(vlm, images["wide"], EXITS)
    torch.testing.assert_close(found[BLOCKS - 1], joined(vlm.family, vlm.model, inputs), rtol=0, atol=2e-5)
    for exit in EXITS:
        with exit_at(vlm, exit):
            torch.testing.assert_close(found[exit], joined(vlm.family, vlm.model, inputs), rtol=0, atol=2e-5)
        if (cut := truncated(vlm, exit)) is not None:
            torch.testing.assert_close(found[exit], joined(vlm.family, cut, inputs), rtol=0, atol=2e-5)
        native = vlm.model.get_image_features(**inputs, vision_feature_layer=exit, output_hidden_states=True)
        torch.testing.assert_close(found[exit], torch.cat(list(native.pooler_output)), rtol=0, atol=2e-5)


def joined(family, model, inputs):
    return torch.cat(family.features(model, dict(inputs)))


def test_the_answers_are_those_of_plain_generate(vlm, rows, features, images):
    found = answers(vlm, rows, features, 7)
    for key, text, name in QUESTIONS:
        for exit in EXITS:
            assert found[key, exit] == plain(vlm, text, images.get(name), exit), (key, exit)
        texts = {exit: vlm.tokenizer.decode(found[key, exit], skip_special_tokens=True).strip() for exit in EXITS}
        assert vlm.answer(images.get(name), text, EXITS, DECODING.max_new_tokens) == texts, key
    seen = {found[key, exit] for key, _, name in QUESTIONS if name for exit in EXITS}
    assert len(seen) > len(QUESTIONS)  # exit and image matter, so the test could fail


def test_a_mixed_batch_answers_as_one_by_one(vlm, rows, features):
    alone = answers(vlm, rows, features, 1)
    assert answers(vlm, rows, features, 64) == alone
    assert answers(vlm, rows[::-1], features, 5) == alone


@pytest.mark.parametrize("name", ["gemma3", "mllama", "qwen2_vl"])  # tests/engines has the other route
def test_sampling_depends_on_the_request_and_the_seed_only(name, images):
    vlm = family_model(name)
    table = {key: exit_features(vlm, image, [1]) for key, image in images.items()}
    features = lambda key, exit: table[key][exit]
    requests = [ExitRequest(Sample(key, text, "benign", image), 1) for key, text, image in QUESTIONS]
    rows = make_rows(vlm, requests, lambda key: layout(vlm, images[key]))
    warm = Decoding(4, temperature=1.5, top_p=0.9, seed=3)  # few draws: one can lie within rounding of a boundary
    drawn = answers(vlm, rows, features, 64, warm)
    assert answers(vlm, rows[::-1], features, 3, warm) == drawn
    assert drawn != answers(vlm, rows, features, 64, Decoding(4, temperature=1.5, top_p=0.9, seed=4))
    assert drawn != answers(vlm, rows, features, 64, Decoding(4))


@torch.inference_mode()
def test_padding_changes_nothing(vlm, images, features):
    """The logits of a short row beside a long one, by the route of whole rows, which every family can go."""
    short, long = Sample("s", "Hi.", "benign", "small"), Sample("l", "Why? " * 30, "benign", "wide")
    rows = make_rows(vlm, [ExitRequest(short, 2), ExitRequest(long, 3)], lambda name: layout(vlm, images[name]))
    last = [first_logits(vlm, batch, features) for batch in (rows[:1], rows)]
    torch.testing.assert_close(last[0][0], last[1][0], rtol=0, atol=2e-4)
    assert (last[1][0] - last[1][1]).abs().max() > 1e-2


def first_logits(vlm, rows, features):
    inputs = whole.batch_inputs(vlm, rows, features)
    config = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return vlm.model.generate(**inputs, **config).logits[0]


@torch.inference_mode()
def test_what_cross_attention_keeps_of_an_image_is_counted(images, monkeypatch):
    """mllama's prompt has one token for an image, and some layers hold keys and values of every patch: 6,404 of them in
    Llama 3.2 Vision."""
    vlm, free = TINY["mllama"](), 40_000_000
    row = make_rows(vlm, [ExitRequest(Sample("s", "Hi.", "benign", "wide"), 1)], lambda name: layout(vlm, images[name]))
    inputs = whole.batch_inputs(vlm, row, lambda name, exit: exit_features(vlm, images[name], [exit])[exit])
    states = inputs["cross_attention_states"]
    cache = vlm.model(**inputs, use_cache=True).past_key_values
    read = [layer for layer in cache.layers if layer.keys.shape[2] == states.shape[1]]  # type: ignore[attr-defined]
    assert len(read) == 1
    held = sum(tensor.nbytes for tensor in (states, read[0].keys, read[0].values)) // states.shape[1]  # type: ignore[attr-defined]  # a patch
    vision = vlm.model.config.vision_config
    vision.image_size = 40 * vision.patch_size
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    n_rows, _ = memory_limits(vlm, inputs["input_ids"].shape[1])  # type: ignore[attr-defined]
    assert 1 < n_rows <= free / 4 / (6404 * held)


def test_lora_stays_off_the_tower(vlm):
    from peft import LoraConfig, get_peft_model

    fresh = TINY[vlm.name]()
    adapted = get_peft_model(fresh.model, LoraConfig(r=2, target_modules=fresh.family.lora_targets))
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    text = fresh.model.config.get_text_config()
    assert len(names) >= 4 * text.num_hidden_layers
    assert all(f".{fresh.family.language_model}." in name for name in names)
    assert not any(f".{fresh.family.tower}." in name for name in names)


@pytest.mark.parametrize(
    "name", [name for name in TINY if name not in NOT_HERE and not family_model(name).shares_prefix]
)
def test_the_policy_s_log_probabilities_are_those_of_generate(name, images):
    """Of greedy answers at two exits, with an image and without, in one batch; tower and projector gone."""
    vlm = TINY[name]()
    features = {(image, exit): exit_features(vlm, images[image], [exit])[exit] for image in images for exit in (1, 3)}
    layouts = {image: layout(vlm, images[image]) for image in images}
    requests = [
        ExitRequest(Sample(key, text, "benign", image), exit) for key, text, image in QUESTIONS for exit in (1, 3)
    ]
    rows = make_rows(vlm, requests, layouts.__getitem__)
    get = lambda image, exit: features[image, exit]
    vlm = without_encoder(vlm)
    policy = Policy(vlm, 2, 4.0, critic=False)
    wanted, said = [], []
    for row in rows:
        inputs = whole.batch_inputs(vlm, [row], get)
        with torch.inference_mode(), whole._states_once(vlm):
            found = vlm.model.generate(
                **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        said.append(found.sequences[0, inputs["input_ids"].shape[1] :])  # type: ignore[attr-defined]
        logits = torch.stack(found.logits)[:, 0].float()  # type: ignore[attr-defined]
        wanted.append(torch.log_softmax(logits, dim=-1).gather(1, said[-1][:, None])[:, 0])
    longest = max(map(len, said))
    responses = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for ids in said])
    mask = torch.stack([torch.arange(longest) < len(ids) for ids in said]).float()
    outputs = policy(rows, responses, mask, get)
    for i, each in enumerate(wanted):
        torch.testing.assert_close(outputs.logprobs[i, : len(each)], each, rtol=0, atol=1e-4)
    outputs.logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in policy.trainable().items() if "lora_B" in n)


def test_embeddings_instead_of_encoder_outputs_would_be_seen(images):
    """`inputs_embeds` loses the positions of qwen's image tokens without a word; the tokens tell."""
    vlm = family_model("qwen2_vl")
    image = images["wide"]
    picture = vlm.picture(image)
    found = exit_features(vlm, image, [vlm.default_exit])[vlm.default_exit]
    ids = torch.tensor([vlm.prompt("Hi.", picture.layout).ids])
    embeddings = vlm.model.get_input_embeddings()(ids)
    embeddings[ids == vlm.image_token_id] = found
    with torch.inference_mode():
        wrong = vlm.model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert tuple(wrong[0].tolist()) != plain(vlm, "Hi.", image, vlm.default_exit)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 40)])
def test_an_odd_image_is_encoded_or_refused_in_one_line(vlm, size):
    image = Image.new("RGB", size, "red")
    try:
        rows = len(exit_features(vlm, image, [2])[2])
        ids = vlm.prompt("Hi.", layout(vlm, image)).ids
    except UserError as error:
        assert "with another size or aspect ratio" in str(error)  # noqa: PT017 (either is right)
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert vlm.family.image_in_every_row or ids.count(vlm.image_token_id) == rows


@torch.inference_mode()
def test_perplexity_is_that_of_the_models_own_logits(vlm):
    texts = ["A cup.", "Sorry, I cannot help with that, and here is why."]
    opening = vlm.tokenizer(vlm.chat("", with_image=False), add_special_tokens=False).input_ids[-2:]
    for text, found in zip(texts, perplexities(vlm, texts), strict=True):
        ids = torch.tensor([opening + vlm.tokenizer(text, add_special_tokens=False).input_ids])
        forwards = {name: torch.ones_like(ids[:, :-1]) for name in vlm.family.forward_inputs}
        logits = vlm.model(input_ids=ids[:, :-1], **forwards).logits[0, len(opening) - 1 :]  # no token sees itself
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(opening) :])
        assert found == pytest.approx(min(float(loss.exp()), 1e9), rel=1e-3)


def test_every_family_has_a_tiny_model():
    assert set(TINY) == set(FAMILIES)
