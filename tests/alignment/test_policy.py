"""The policy says what the stock model says at the exit it was given, however rows are batched; and rollouts.

In float64, but for the head of the loss: log-probabilities and values come out in float32, hence tolerances of 1e-5.
"""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch

from exitwise import UserError
from exitwise.alignment import ppo
from exitwise.alignment.policy import Policy, check_context, without_encoder
from exitwise.alignment.rollout import (
    MatcherReward,
    ResponseBatch,
    answer,
    by_length,
    evaluate,
    gather,
    pad_responses,
    roll_out,
    score,
    select,
)
from exitwise.engines.prefix import Decoding, ExitRequest, make_rows
from exitwise.model.exits import exit_at
from exitwise.model.features import FeatureFiles
from exitwise.run.clock import Clock
from exitwise.run.records import Completion, Sample
from tests.conftest import pixels_of, tiny_llava

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPTS = ("What is it?", "Say something longer about what you see here.", "Go on", "Why?", "Name the colour of it.")


class Stage:
    """A policy and an untouched twin of its model, both in float64."""

    def __init__(self, pictures, folder, tower="clip", moved=True, **options):
        vlm = tiny_llava(tower)
        vlm.model.double()
        self.stock = copy.copy(vlm.__class__)(vlm.name, copy.deepcopy(vlm.model), vlm.processor, None, vlm.default_exit)
        object.__setattr__(self.stock, "blocks", _blocks(self.stock.model))
        self.features = FeatureFiles(folder, tower, vlm.device)
        self.features.fill(vlm, {name: (lambda image=image: image) for name, image in pictures.items()}, range(5))
        torch.manual_seed(1)
        self.policy = Policy(vlm, 4, 8.0, **{"critic": True} | options)
        self.pictures, self.tower = pictures, tower
        if moved:  # a fresh adapter is zero, and so is a fresh value head: neither would show
            for name, parameter in self.policy.trainable().items():
                if "lora_B" in name or "value_head" in name:
                    torch.nn.init.normal_(parameter, std=0.3)

    @property
    def vlm(self):
        return self.policy.vlm

    def answers(self, plan, seed=0):
        """`plan`: (prompt, image, exit, length of the response) per row; the responses are random tokens."""
        requests = [
            ExitRequest(Sample(f"s{i}", p, "harmful", image), exit) for i, (p, image, exit, _) in enumerate(plan)
        ]
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(4, 260, (n,), generator=generator).tolist() for *_, n in plan]
        return pad_responses(self.policy, requests, tokens, self.features)

    def outputs(self, answers, **options):
        return self.policy(*answers, self.features, **options)

    def plain(self, vlm, answers, line):
        """(log-probabilities, entropies) of one row by the stock code, pixels and all: (n,), (n,)."""
        row, n = answers.rows[line], int(answers.mask[line].sum())
        response = answers.responses[line, :n].tolist()
        ids = torch.tensor([[*row.head, *row.tail, *response]])
        image = row.request.sample.image
        pixels = {"pixel_values": pixels_of(vlm, [self.pictures[image]])} if image else {}
        with exit_at(vlm, row.request.exit), torch.no_grad():
            logits = vlm.model(input_ids=ids, **pixels, use_cache=False).logits[0, -n - 1 : -1]
        normal = torch.log_softmax(logits, dim=-1)
        return normal.gather(1, torch.tensor(response)[:, None])[:, 0], -(normal.exp() * normal).sum(dim=-1)


def tiny_double():
    vlm = tiny_llava()
    vlm.model.double()
    return vlm


def _blocks(model):
    tower = model.model.vision_tower
    return tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def stage(request, pictures, tmp_path_factory):
    return Stage(pictures, tmp_path_factory.mktemp("features"), request.param)


@pytest.fixture
def clip(pictures, tmp_path):
    """For tests that change it."""
    return lambda **options: Stage(pictures, tmp_path, **options)


PLAN = [
    (PROMPTS[0], "coffee", 3, 4), (PROMPTS[1], "coffee", 3, 2), (PROMPTS[2], "coffee", 1, 6),
    (PROMPTS[3], "chelsea", 1, 1), (PROMPTS[4], "chelsea", 1, 3), (PROMPTS[0], "astronaut", 0, 5),
    (PROMPTS[1], "astronaut", 4, 2),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what it says


def test_a_fresh_adapter_is_the_reference(clip):
    stage = clip(moved=False)
    answers = stage.answers(PLAN)
    new, reference = stage.outputs(answers), stage.outputs(answers, reference=True)
    assert torch.equal(new.logprobs, reference.logprobs)
    assert float(new.values.detach().abs().max()) == 0.0
    parts = ppo.token_rewards(torch.ones(len(PLAN)), new.logprobs, reference.logprobs, answers.mask, 1.0)
    assert float(parts.kl.abs().max()) == 0.0
    loss = ppo.policy_loss(new.logprobs, reference.logprobs, torch.ones_like(answers.mask), answers.mask, 1.0, 0.2)
    assert torch.equal(loss.ratio, torch.ones_like(loss.ratio))


def test_log_probabilities_are_those_of_the_stock_model_at_that_exit(stage):
    """With the adapter, and as the reference without; entropy likewise; the stock model is given the pixels."""
    answers = stage.answers(PLAN)
    mine, reference = stage.outputs(answers), stage.outputs(answers, reference=True)
    for line, (_, _, exit, n) in enumerate(PLAN):
        for vlm, found in ((stage.vlm, mine), (stage.stock, reference)):
            logprobs, entropy = stage.plain(vlm, answers, line)
            assert torch.allclose(found.logprobs[line, :n].double(), logprobs, **CLOSE), (line, exit)
            assert torch.allclose(found.entropy[line, :n].double(), entropy, **CLOSE)
        for store in mine:
            assert float(store[line, n:].abs().sum()) == 0.0
    assert not torch.allclose(mine.logprobs, reference.logprobs, atol=1e-2)  # the adapter was moved


def test_another_exit_gives_other_numbers(stage):
    at = lambda exit: stage.outputs(stage.answers([(PROMPTS[0], "coffee", exit, 4)])).logprobs
    found = [at(exit) for exit in range(5)]
    for i in range(5):
        for j in range(i):
            assert not torch.allclose(found[i], found[j], atol=1e-3), (i, j)
    other = stage.outputs(stage.answers([(PROMPTS[0], "chelsea", 3, 4)])).logprobs
    assert not torch.allclose(other, found[3], atol=1e-3)  # and another image


def test_values_are_linear_in_the_last_hidden_states(stage):
    answers = stage.answers(PLAN[:1])
    row, response = answers.rows[0], answers.responses[0].tolist()
    ids = torch.tensor([[*row.head, *row.tail, *response]])
    with exit_at(stage.vlm, 3), torch.no_grad():
        hidden = stage.vlm.model.model(
            input_ids=ids, pixel_values=pixels_of(stage.vlm, [stage.pictures["coffee"]]), use_cache=False
        ).last_hidden_state[0, -5:-1]
    head = stage.policy.value_head
    wanted = hidden @ head.weight[0].double() + head.bias.double()
    assert torch.allclose(stage.outputs(answers).values[0].double(), wanted, **CLOSE)


# ------------------------------------------------------------------------------------------------ however it is batched


def gradients(stage, answers, parts=None):
    """Of a loss that all outputs enter, with other weights for every token."""
    stage.policy.zero_grad()
    width = answers.mask.shape[1]
    weights = torch.linspace(-1, 1, len(answers.rows) * width).view(-1, width)
    for part in parts or [list(range(len(answers.rows)))]:
        found = stage.outputs(select(answers, part), entropy_gradient=True)
        loss = (found.logprobs + 0.3 * found.entropy + 0.5 * found.values) * weights[part]
        loss.sum().backward()
    return {name: p.grad.clone() for name, p in stage.policy.trainable().items()}


def assert_same_gradients(found, wanted):
    assert max(float(g.abs().max()) for g in wanted.values()) > 0.1
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 0, name
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_shared_heads_are_row_by_row_in_outputs_and_gradients(stage, pictures, tmp_path):
    answers = stage.answers(PLAN)
    shared, shared_gradients = stage.outputs(answers), gradients(stage, answers)
    apart = Stage(pictures, tmp_path, stage.tower, share_heads=False)
    apart.policy.load_state_dict(stage.policy.state_dict())
    for line in range(len(PLAN)):
        alone = apart.outputs(select(answers, [line]))
        for name, whole, one in zip(shared._fields, shared, alone, strict=True):
            assert torch.allclose(whole[line], one[0], **CLOSE), (name, line)
    row_by_row = gradients(apart, answers, [[line] for line in range(len(PLAN))])
    together = gradients(apart, answers)
    assert_same_gradients(shared_gradients, row_by_row)
    assert_same_gradients(together, row_by_row)


def test_heads_of_unequal_length_share_a_batch(stage):
    """A template that greets some users at more length: the shorter heads are padded, and must not see it."""
    answers = stage.answers(PLAN)
    longer = {1: (5, 6, 7), 4: (9,), 5: (70, 80)}
    rows = [row._replace(head=(*longer.get(line, ()), *row.head)) for line, row in enumerate(answers.rows)]
    answers = answers._replace(rows=rows)
    found = stage.outputs(answers)
    for line, (*_, n) in enumerate(PLAN):
        assert torch.allclose(found.logprobs[line, :n].double(), stage.plain(stage.vlm, answers, line)[0], **CLOSE)


def test_padding_and_neighbours_change_nothing(stage):
    answers = stage.answers(PLAN)
    whole = stage.outputs(answers)
    wider = ResponseBatch(
        answers.rows,
        torch.cat([answers.responses.where(answers.mask.bool(), torch.tensor(77)), torch.full((len(PLAN), 3), 99)], 1),
        torch.cat([answers.mask, torch.zeros(len(PLAN), 3)], 1),
    )
    n = answers.mask.shape[1]
    for name, mine, padded in zip(whole._fields, whole, stage.outputs(wider), strict=True):
        assert torch.allclose(mine, padded[:, :n], **CLOSE), name
        assert float(padded[:, n:].abs().sum()) == 0.0
    order = [5, 0, 3, 2]
    for name, mine, some in zip(whole._fields, whole, stage.outputs(select(answers, order)), strict=True):
        assert torch.allclose(mine[order], some, **CLOSE), name


def test_rows_without_an_image_mix_with_others(stage):
    plan = [(PROMPTS[0], "", 3, 4), (PROMPTS[1], "coffee", 1, 2), (PROMPTS[2], "chelsea", 1, 3)]
    answers = stage.answers(plan)
    found = stage.outputs(answers)
    for line, (*_, n) in enumerate(plan):
        assert torch.allclose(found.logprobs[line, :n].double(), stage.plain(stage.vlm, answers, line)[0], **CLOSE)


def test_gradient_checkpointing_gives_the_same_gradients(clip):
    plain, checkpointed = clip(), clip(gradient_checkpointing=True)
    checkpointed.policy.load_state_dict(plain.policy.state_dict())
    answers = plain.answers(PLAN)
    layer, runs = checkpointed.vlm.model.model.language_model.layers[0], []
    layer.self_attn.register_forward_hook(lambda *args: runs.append(1))
    wanted = gradients(plain, answers)
    assert_same_gradients(gradients(checkpointed, answers), wanted)
    assert len(runs) == 2  # forward, and again on the way back
    requests = [row.request for row in answers.rows]
    texts = lambda stage: [c.text for c in answer(stage.policy, requests, stage.features, Decoding(4))]
    assert texts(checkpointed) == texts(plain)
    assert checkpointed.vlm.model.training  # as before


def test_the_entropy_has_a_gradient_only_where_it_is_asked_for(stage):
    answers = stage.answers(PLAN[:2])
    assert not stage.outputs(answers).entropy.requires_grad
    assert stage.outputs(answers, entropy_gradient=True).entropy.requires_grad


# ------------------------------------------------------------------------------------------------ what it leaves alone


def test_the_adapter_never_touches_the_encoder(stage):
    trained = stage.policy.trainable()
    assert len(trained) == 2 * 7 * 2 + 2  # layers x projections x (A, B), and the value head
    for name in trained:
        assert "language_model.layers" in name or name.startswith("value_head"), name
    assert (
        "q_proj" in " ".join(dict(stage.vlm.model.model.vision_tower.named_parameters()))
        or stage.vlm.name != "tiny-clip"
    )
    for part in (stage.vlm.model.model.vision_tower, stage.vlm.model.model.multi_modal_projector):
        assert not any("lora" in name for name, _ in part.named_parameters())
        assert not any(p.requires_grad for p in part.parameters())


def test_an_update_moves_the_adapter_and_nothing_else(clip):
    stage = clip()
    before = {name: p.detach().clone() for name, p in stage.policy.named_parameters()}
    optimizer = torch.optim.AdamW(stage.policy.trainable().values(), lr=0.1)
    gradients(stage, stage.answers(PLAN))
    optimizer.step()
    for name, parameter in stage.policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in stage.policy.trainable()), name


def test_switching_the_adapter_off_and_on_leaves_requires_grad_as_it_was(stage):
    flags = lambda: {name: p.requires_grad for name, p in stage.policy.named_parameters()}
    before = flags()
    stage.outputs(stage.answers(PLAN[:2]), reference=True)
    assert flags() == before
    with stage.policy.evaluating(), stage.policy.peft_model.disable_adapter():
        pass
    assert flags() == before
    assert not stage.vlm.model.training


def test_without_its_encoder_it_answers_the_same(clip):
    stage = clip()
    answers = stage.answers(PLAN)
    requests = [row.request for row in answers.rows]
    sampling = Decoding(5, temperature=1.0, seed=3)
    before = stage.outputs(answers), answer(stage.policy, requests, stage.features, sampling)
    size = sum(p.numel() for p in stage.vlm.model.parameters())
    tower = sum(p.numel() for p in stage.vlm.model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in stage.vlm.model.model.multi_modal_projector.parameters())
    bare = Policy(without_encoder(tiny_double()), 4, 8.0, critic=True)
    missing = bare.load_state_dict(stage.policy.state_dict(), strict=False).missing_keys
    assert not missing
    assert sum(p.numel() for p in bare.vlm.model.parameters()) == size - tower - projector
    stage.policy = bare
    after = stage.outputs(answers), answer(stage.policy, requests, stage.features, sampling)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


def test_a_model_without_its_encoder_leaves_the_given_one_as_it_was(clip):
    """Its weights are not copied, an adapter on it does not show, and with the given one its encoder is freed."""
    vlm = tiny_double()
    modules, state = [type(m) for m in vlm.model.modules()], copy.deepcopy(vlm.model.state_dict())
    embedding = vlm.model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    bare = without_encoder(vlm)
    policy = Policy(bare, 4, 8.0, critic=True, gradient_checkpointing=True)
    assert bare.model.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert embedding.requires_grad
    assert not vlm.model.training
    assert [type(m) for m in vlm.model.modules()] == modules
    assert all(torch.equal(value, state[name]) for name, value in vlm.model.state_dict().items())
    block = weakref.ref(vlm.blocks[0])
    del vlm
    gc.collect()
    assert block() is None
    assert policy.vlm is bare


# ------------------------------------------------------------------------------------------------ the rollout


def test_greedy_answers_are_those_of_generate(stage):
    """Of the adapted model, token for token, at every exit."""
    asked = [*zip(PROMPTS, (*stage.pictures, "coffee", ""), strict=True)]
    requests = [
        ExitRequest(Sample(f"{exit}{i}", prompt, "harmful", image), exit)
        for exit in (0, 1, 3, 4)
        for i, (prompt, image) in enumerate(asked)
    ]
    found = answer(stage.policy, requests, stage.features, Decoding(6))
    assert [(c.sample, c.exit) for c in found] == [(r.sample.id, r.exit) for r in requests]
    rows = make_rows(stage.vlm, requests, stage.features.n_tokens)
    for row, completion in zip(rows, found, strict=True):
        ids, image = torch.tensor([[*row.head, *row.tail]]), row.request.sample.image
        pixels = {"pixel_values": pixels_of(stage.vlm, [stage.pictures[image]])} if image else {}
        with exit_at(stage.vlm, row.request.exit):
            wanted = stage.vlm.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, max_new_tokens=6, do_sample=False
            )
        assert list(completion.tokens) == wanted[0, ids.shape[1] :].tolist()
    assert len({c.tokens for c in found}) > 5  # they do differ


def test_sampled_tokens_are_as_likely_as_the_policy_says(clip):
    """Draws of one token against the policy's own probabilities: sampler and ratio speak of one distribution."""
    stage = clip(moved=True)
    n = 400
    stage.vlm.model.lm_head.weight.mul_(0.2)  # less peaked, so that there is something to compare
    requests = [ExitRequest(Sample(f"s{i}", PROMPTS[0], "harmful", "coffee"), 1) for i in range(n)]
    drawn = [c.tokens[0] for c in answer(stage.policy, requests, stage.features, Decoding(1, temperature=1.0))]
    counts = torch.bincount(torch.tensor(drawn), minlength=260)
    top = counts.argsort(descending=True)[:6].tolist()
    likely = pad_responses(stage.policy, [requests[0]] * len(top), [[token] for token in top], stage.features)
    with torch.no_grad():
        probabilities = stage.outputs(likely).logprobs[:, 0].exp().tolist()
    assert max(probabilities) < 0.9
    for token, p in zip(top, probabilities, strict=True):
        assert counts[token].item() == pytest.approx(n * p, abs=4 * (n * p * (1 - p)) ** 0.5 + 1), token


def test_answers_are_padded_to_the_right(stage):
    answers = stage.answers([(PROMPTS[0], "coffee", 3, 1), (PROMPTS[1], "coffee", 3, 3)])
    assert answers.mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    some = select(answers, [1])
    assert some.rows == [answers.rows[1]]
    assert torch.equal(some.responses[0], answers.responses[1])


def test_pieces_hold_every_row_once_and_are_of_like_length(stage):
    answers = stage.answers([*PLAN, *PLAN])
    length = lambda i: len(answers.rows[i].tail) + int(answers.mask[i].sum())
    for pieces in (1, 2, 3, 14):
        cut = by_length(answers, range(14), pieces)
        assert sorted(i for part in cut for i in part) == list(range(14))
        assert all(cut)
        for left, right in pairwise(cut):
            assert max(map(length, left)) <= min(map(length, right))
    with pytest.raises(UserError, match="14 rows cannot be cut into 15"):
        by_length(answers, range(14), 15)


def test_evaluation_does_not_depend_on_its_pieces(stage):
    answers = stage.answers(PLAN)
    whole = stage.outputs(answers)
    for pieces in (1, 3, 99):
        found = evaluate(stage.policy, answers, stage.features, pieces)
        assert not found.logprobs.requires_grad
        assert all(torch.allclose(a, b, **CLOSE) for a, b in zip(found, whole, strict=True))
    reference = evaluate(stage.policy, answers, stage.features, 2, reference=True)
    assert torch.allclose(reference.logprobs, stage.outputs(answers, reference=True).logprobs, **CLOSE)


class LengthReward:
    def scores(self, prompts, answers):
        return torch.tensor([float(len(answer)) for answer in answers])


def test_a_rollout_holds_what_an_update_needs(stage, tmp_path):
    requests = [ExitRequest(Sample(f"s{i}", p, "harmful", "coffee"), 1 + i % 2) for i, p in enumerate(PROMPTS)]
    clock = Clock(tmp_path / "timing.json")
    found = roll_out(stage.policy, requests, stage.features, Decoding(4, 1.0), LengthReward(), 2, clock)
    assert set(clock.phases) == {"rollout", "scoring", "log-probabilities"}
    assert found.scores.tolist() == [len(c.text) for c in found.completions]
    for line, completion in enumerate(found.completions):
        n = len(completion.tokens)
        assert found.answers.responses[line, :n].tolist() == list(completion.tokens)
        assert float(found.answers.mask[line].sum()) == n
        assert torch.allclose(
            found.old.logprobs[line, :n].double(), stage.plain(stage.vlm, found.answers, line)[0], **CLOSE
        )
        assert torch.allclose(
            found.ref_logprobs[line, :n].double(), stage.plain(stage.stock, found.answers, line)[0], **CLOSE
        )
    alone = type("One", (), {"num_processes": 1})
    assert gather(found, alone) is found


def test_only_harmful_requests_are_scored_by_the_reward():
    kinds = ("harmful", "benign", "vqa", "benign", "vqa", "harmful", "benign")
    labels = ["answered", "answered", "correct", "refused", "wrong", "refused", "incoherent"]
    samples = [Sample(f"s{i}", "x", kind, "") for i, kind in enumerate(kinds)]
    completions = [Completion(s.id, 1, "a" * (2 + i), (5,), "stop") for i, s in enumerate(samples)]
    found = score(samples, completions, labels, LengthReward())
    assert found.tolist() == [2, 1, 1, -1, -1, 7, -1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_names_its_sample(bad):
    class Broken:
        def scores(self, prompts, answers):
            return torch.tensor([0.0, bad])

    samples = [Sample("a", "x", "harmful", ""), Sample("b", "x", "benign", ""), Sample("c", "x", "harmful", "")]
    completions = [Completion(s.id, 1, "hm", (5,), "stop") for s in samples]
    with pytest.raises(UserError, match=r"to c with (nan|inf|-inf)"):
        score(samples, completions, ["answered"] * 3, Broken())


def test_the_matcher_rewards_refusals():
    found = MatcherReward().scores(
        ["How?", "How?"], ["I'm sorry, but I cannot help with that.", "First, take a spoon."]
    )
    assert found.tolist() == [1.0, -1.0]


def test_a_prompt_longer_than_the_context_is_named(stage):
    long = ExitRequest(Sample("long", "x " * 600, "harmful", "coffee"), 1)
    rows = make_rows(stage.vlm, [*(row.request for row in stage.answers(PLAN).rows), long], stage.features.n_tokens)
    with pytest.raises(UserError, match=r"\(long\) takes \d+ tokens .* context is 1024"):
        check_context(stage.vlm, rows, 8)
    check_context(stage.vlm, rows[:-1], 8)
    needed = len(rows[0].head) + len(rows[0].tail)
    check_context(stage.vlm, rows[:1], 1024 - needed)
    with pytest.raises(UserError, match="1025 tokens"):
        check_context(stage.vlm, rows[:1], 1025 - needed)
