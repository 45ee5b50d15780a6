"""Rollouts: answers are those of `generate`, sampled as the policy says, scored and padded row by row."""

import hashlib
from itertools import pairwise

import pytest
import torch

from exitwise import UserError
from exitwise.alignment.policy import check_context
from exitwise.alignment.rollout import (
    MatcherReward,
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
from exitwise.engines.sampling import generator_of
from exitwise.model.exits import exit_at
from exitwise.run.clock import Clock
from exitwise.run.exit import Exit
from exitwise.run.records import Completion, Sample
from tests.alignment.stage import CLOSE, PLAN, PROMPTS
from tests.conftest import pixels_of


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


def test_a_set_of_layers_draws_what_it_drew_as_one_number():
    """exitwise 0.1.0 wrote 3+18 as 1003018 and seeded with that."""
    for exit, name in (("3+18", "1003018"), ("18", "18")):
        digest = hashlib.sha256(f"7\0s\0{name}".encode()).digest()
        request = ExitRequest(Sample("s", "x", "harmful", ""), Exit.of(exit))
        assert generator_of(request, 7).initial_seed() == int.from_bytes(digest[:8], "big") >> 1


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
