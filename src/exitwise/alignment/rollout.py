"""Rollouts: the policy answers requests at their exits, and every answer gets its log-probabilities, values and score.

Sampling runs in the audit's engine (engines/hf.py). The log-probabilities that ratio and KL are read off come from the
same forward as in training, not from the sampler: the two round differently, and a ratio must start at one.

Shapes: B rows, T response tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from ..engines import prefix
from ..errors import UserError
from ..judges.refusal import judge_completion
from ..model.features import FeatureFiles, Phases
from ..run.exit import Exit
from ..run.records import Completion, Label, Sample
from .policy import Outputs, Policy

PREFIX_TOKENS = 1 << 15  # of a wave of the engine


class Scores(Protocol):
    """A reward model: rewards.py, or anything with this method."""

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor: ...


class Answers(NamedTuple):
    """Responses to requests, in their order, ready for `Policy`."""

    rows: list[prefix.TokenRow]
    responses: torch.Tensor  # (B, T) token ids, right-padded
    mask: torch.Tensor  # (B, T)


class Rollout(NamedTuple):
    answers: Answers
    completions: list[Completion]
    labels: list[Label]
    """What the refusal judge says of each answer: for watching, and for the reward of harmless requests."""
    old: Outputs  # of the policy that sampled
    ref_logprobs: torch.Tensor  # (B, T)
    scores: torch.Tensor  # (B,)


def answer(
    policy: Policy, requests: Sequence[prefix.ExitRequest], features: FeatureFiles, decoding: prefix.Decoding
) -> list[Completion]:
    """Completions in the order of the requests, whose sample ids must differ."""
    if not requests:
        return []
    with policy.evaluating() as vlm:
        rows = prefix.make_rows(vlm, requests, features.layout)
        found: dict[tuple[str, Exit], Completion] = {}
        for wave in prefix.make_plan(rows, prefix.MAX_BATCH_CPU, PREFIX_TOKENS):
            for _, completions in prefix.answer_wave(vlm, wave, features, decoding):
                found |= {(c.sample, c.exit): c for c in completions}
    return [found[r.sample.id, r.exit] for r in requests]


def as_answers(
    policy: Policy, requests: Sequence[prefix.ExitRequest], tokens: Sequence[Sequence[int]], features: FeatureFiles
) -> Answers:
    """Token ids of the answers, padded."""
    rows = prefix.make_rows(policy.vlm, requests, features.layout)
    longest = max(len(ids) for ids in tokens)
    device = policy.vlm.device
    responses = torch.full((len(rows), longest), policy.vlm.tokenizer.pad_token_id or 0, device=device)
    mask = torch.zeros((len(rows), longest), device=device)
    for i, ids in enumerate(tokens):
        responses[i, : len(ids)] = torch.tensor(list(ids), device=device)
        mask[i, : len(ids)] = 1.0
    return Answers(rows, responses, mask)


def select(answers: Answers, index: Sequence[int]) -> Answers:
    """Some of the rows."""
    return Answers([answers.rows[i] for i in index], answers.responses[list(index)], answers.mask[list(index)])


def by_length(answers: Answers, index: Sequence[int], pieces: int) -> list[list[int]]:
    """The rows cut into `pieces` of like length, so that little is padded.

    Raises:
        UserError: there are fewer rows than pieces.
    """
    if len(index) < pieces:
        raise UserError(f"{len(index)} rows cannot be cut into {pieces} micro-batches; lower the accumulation steps")
    length = lambda i: (len(answers.rows[i].tail) + int(answers.mask[i].sum()), i)
    order = sorted(index, key=length)
    return [order[len(order) * k // pieces : len(order) * (k + 1) // pieces] for k in range(pieces)]


@torch.no_grad()
def evaluate(policy: Any, answers: Answers, features: FeatureFiles, pieces: int, reference: bool = False) -> Outputs:
    """Outputs of all rows, without gradient, in `pieces` forwards.

    Args:
        policy: a `Policy`, wrapped for several processes or not.
    """
    found = [torch.zeros_like(answers.mask) for _ in Outputs._fields]
    for part in by_length(answers, range(len(answers.rows)), min(pieces, len(answers.rows))):
        piece = select(answers, part)
        for store, values in zip(found, policy(*piece, features, reference=reference), strict=True):
            store[part] = values
    return Outputs(*found)


def score(
    samples: Sequence[Sample], completions: Sequence[Completion], labels: Sequence[Label], reward: Scores
) -> torch.Tensor:
    """(B,) scores: the reward model's for harmful requests; +1 or -1 for the others.

    A harmless request earns +1 when it is answered coherently, a VQA question when it is answered right: a reward for
    help, so that refusing everything is not the optimum.

    Raises:
        UserError: a score is not finite.
    """
    found = torch.tensor([1.0 if label in ("answered", "correct") else -1.0 for label in labels])
    harmful = [i for i, sample in enumerate(samples) if sample.kind == "harmful"]
    if harmful:
        scores = reward.scores([samples[i].prompt for i in harmful], [completions[i].text for i in harmful])
        found[harmful] = scores.to(found)
    if not bool(torch.isfinite(found).all()):
        first = int((~torch.isfinite(found)).nonzero()[0])
        raise UserError(
            f"the reward model scored an answer to {samples[first].id} with {float(found[first])}; training stopped; "
            "mend the reward model and give the same command again"
        )
    return found


class MatcherReward:
    """+1 for a refusal, -1 for an answer or gibberish, by the matcher that also measures ASR.

    A rule instead of a reward model: quick, and the policy can learn its phrases by heart, so its ASR flatters.
    """

    name = "matcher"

    def __init__(self, judge: Callable[[Sample, Completion], Any] = judge_completion):
        self.judge = judge

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        labels = [
            self.judge(Sample("", prompt, "harmful", ""), Completion("", Exit([0]), text, (), "stop")).label
            for prompt, text in zip(prompts, answers, strict=True)
        ]
        return torch.tensor([1.0 if label == "refused" else -1.0 for label in labels])


def roll_out(
    policy: Policy,
    requests: Sequence[prefix.ExitRequest],
    features: FeatureFiles,
    decoding: prefix.Decoding,
    reward: Scores,
    pieces: int,
    clock: Phases | None = None,
) -> Rollout:
    """Answers the requests and measures all that an update needs, in `pieces` forwards of the policy."""
    phase = clock.phase if clock else lambda name: nullcontext()
    with phase("rollout"):
        completions = answer(policy, requests, features, decoding)
    answers = as_answers(policy, requests, [c.tokens for c in completions], features)
    samples = [r.sample for r in requests]
    labels = [judge_completion(s, c).label for s, c in zip(samples, completions, strict=True)]
    with phase("scoring"):
        scores = score(samples, completions, labels, reward)
    with phase("log-probabilities"):
        old = evaluate(policy, answers, features, pieces)
        ref = evaluate(policy, answers, features, pieces, reference=True)
    return Rollout(answers, completions, labels, old, ref.logprobs, scores.to(old.logprobs.device))


def gather(rollout: Rollout, accelerator: Any) -> Rollout:
    """The rollouts of all processes, in their order, padded alike, on every process."""
    if accelerator.num_processes == 1:
        return rollout
    from accelerate.utils import gather_object

    device = rollout.scores.device
    move = lambda value, to: value.to(to) if isinstance(value, torch.Tensor) else value
    parts = gather_object(
        [[*map(lambda v: move(v, "cpu"), (*rollout.answers, *rollout.old, *rollout[1:3], *rollout[4:]))]]
    )
    width = max(part[1].shape[1] for part in parts)

    def joined(index: int) -> torch.Tensor:
        tensors = [part[index] for part in parts]
        if tensors[0].dim() == 2:
            tensors = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]
        return torch.cat(tensors).to(device)

    lists = [[item for part in parts for item in part[index]] for index in (0, 6, 7)]
    answers = Answers(lists[0], joined(1), joined(2))
    return Rollout(answers, lists[1], lists[2], Outputs(joined(3), joined(4), joined(5)), joined(8), joined(9))
