"""The engine's answers are those of plain generate, however requests are batched."""

import pytest
import torch

from exitwise import Sample, exit_at, exit_features
from exitwise.engines.prefix import Decoding, ExitRequest, _Batch, answer_wave, make_plan, make_rows, perplexities

GREEDY = Decoding(12)
QUESTIONS = ("Hi.", "What is this?", "Name two colours, and say at length why.", "é ü 漢字?", "x" * 60, "No image here")


@pytest.fixture(scope="module")
def requests(tiny):
    names = ["coffee", "chelsea", "", "astronaut", "coffee", ""]
    samples = [Sample(f"s{i}", q, "benign", names[i]) for i, q in enumerate(QUESTIONS)]
    return [ExitRequest(sample, exit) for sample in samples for exit in range(tiny.n_blocks + 1)]


@pytest.fixture(scope="module")
def features(tiny, pictures):
    table = {name: exit_features(tiny, image, range(tiny.n_blocks + 1)) for name, image in pictures.items()}
    return lambda name, exit: table[name][exit]


def run(vlm, requests, features, batch_size=7, decoding=GREEDY, prefix_tokens=10**6):
    rows = make_rows(vlm, requests, lambda name: 16)
    found = {}
    for wave in make_plan(rows, batch_size, prefix_tokens):
        for _, completions in answer_wave(vlm, wave, features, decoding):
            found |= {(c.sample, c.exit): c for c in completions}
    assert len(found) == len(requests)
    return found


def test_answers_are_those_of_plain_generate(tiny, requests, features, pictures):
    found = run(tiny, requests, features)
    for request in requests:
        image = pictures.get(request.sample.image)
        text = tiny.chat(request.sample.prompt, with_image=image is not None)
        inputs = tiny.processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        with exit_at(tiny, request.exit):
            out = tiny.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert found[request.sample.id, request.exit].tokens == tuple(out.tolist())
    assert len({c.tokens for c in found.values()}) > len(QUESTIONS)  # the exit matters, so the test could fail


@pytest.mark.parametrize(("batch_size", "prefix_tokens"), [(1, 1), (3, 40), (128, 10**6)])
def test_batching_changes_nothing(tiny, requests, features, batch_size, prefix_tokens):
    expected = run(tiny, requests, features)
    assert run(tiny, requests[::-1], features, batch_size, prefix_tokens=prefix_tokens) == expected


def test_sampling_depends_on_the_request_and_the_seed_only(tiny, requests, features):
    warm = Decoding(12, temperature=1.5, top_p=0.9, seed=3)
    first = run(tiny, requests, features, 5, warm)
    assert run(tiny, requests[::-1], features, 64, warm, 50) == first
    other = run(tiny, requests, features, 5, Decoding(12, temperature=1.5, top_p=0.9, seed=4))
    assert other != first
    assert first != run(tiny, requests, features)


def test_sampling_follows_the_distribution(tiny):
    """10,000 draws from four tokens; top_p = 0.75 leaves the two likeliest."""
    batch = object.__new__(_Batch)
    batch.decoding = Decoding(temperature=1.0, top_p=0.75)
    batch.generators = [torch.Generator().manual_seed(i) for i in range(10_000)]
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log().expand(10_000, 4)
    counts = torch.bincount(batch.choose(logits), minlength=4).double() / 10_000
    assert counts[0] == counts[2] == 0
    assert counts[1].item() == pytest.approx(0.625, abs=0.02)


def test_finished_rows_stop(tiny, requests, features):
    """Rows end at the end-of-text id; the id is kept, nothing follows it."""
    stop = tiny.tokenizer.eos_token_id
    long = run(tiny, requests, features, decoding=Decoding(64))
    ended = [c for c in long.values() if c.finish == "stop"]
    assert all(c.tokens[-1] == stop and stop not in c.tokens[:-1] for c in ended)
    assert all(len(c.tokens) == 64 and stop not in c.tokens for c in long.values() if c.finish == "length")


def test_skipped_batches_leave_the_rest_as_it_was(tiny, requests, features):
    rows = make_rows(tiny, requests, lambda name: 16)
    (wave,) = make_plan(rows, 4, 10**6)
    whole = dict(answer_wave(tiny, wave, features, Decoding(8)))
    part = dict(answer_wave(tiny, wave, features, Decoding(8), skip=frozenset({0, 2})))
    assert part == {i: whole[i] for i in whole if i not in (0, 2)}


def test_every_request_is_planned_once(tiny, requests):
    rows = make_rows(tiny, requests, lambda name: 16)
    for size, tokens in ((1, 1), (4, 60), (64, 10**6)):
        waves = make_plan(rows, size, tokens)
        planned = [row for wave in waves for batch in wave.batches for row in batch]
        assert sorted(map(repr, planned)) == sorted(map(repr, rows))
        assert all(len(batch) <= size for wave in waves for batch in wave.batches)
        assert make_plan(rows, size, tokens) == waves


def test_perplexity_is_exp_of_the_mean_loss(tiny):
    text = "A cup of coffee"
    opening = tiny.tokenizer(tiny.chat("", with_image=False), add_special_tokens=False).input_ids[-2:]
    ids = torch.tensor([opening + tiny.tokenizer(text, add_special_tokens=False).input_ids])
    labels = ids.clone()
    labels[:, :2] = -100
    expected = float(tiny.model(input_ids=ids, labels=labels).loss.exp())
    found = perplexities(tiny, ["", text, "a much longer text beside it, which must not matter"])
    assert found[0] is None
    assert found[1] == pytest.approx(expected, rel=1e-3)
