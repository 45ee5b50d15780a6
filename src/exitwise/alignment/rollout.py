"""Rollouts: the policy answers requests at their exits, and every answer gets its log-probabilities, values and score.

Sampling uses the audit's engine (engines/prefix.py). The log-probabilities of ratio and KL are computed by the forward
pass of training, not by the sampler: the two round differently, and a ratio must start at one.

Shapes: B rows, T response tokens.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..engines import prefix
from ..errors import UserError
from ..judges.refusal import judge_completion
from ..model.features import FeatureFiles, Phases
from ..rewards.protocol import RewardModel
from ..run.exit import Exit
from ..run.records import Completion, Label, Sample
from .policy import Outputs, Policy

if TYPE_CHECKING:
    from accelerate import Accelerator

PREFIX_TOKENS = 1 << 15  # of a wave of the engine


class ResponseBatch(NamedTuple):
    """Responses to requests, in their order, as `Policy` takes them."""

    rows: list[prefix.TokenRow]
    responses: torch.Tensor  # (B, T) token ids, right-padded
    mask: torch.Tensor  # (B, T)


class Rollout(NamedTuple):
    """Sampled answers with all that an update needs."""

    answers: ResponseBatch
    completions: list[Completion]
    labels: list[Label]
    """The judge `refusal`'s label of each answer: for monitoring, and for the reward of harmless requests."""
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


def pad_responses(
    policy: Policy, requests: Sequence[prefix.ExitRequest], tokens: Sequence[Sequence[int]], features: FeatureFiles
) -> ResponseBatch:
    """The token ids of responses, right-padded, with the rows of their requests."""
    rows = prefix.make_rows(policy.vlm, requests, features.layout)
    longest = max(len(ids) for ids in tokens)
    device = policy.vlm.device
    responses = torch.full((len(rows), longest), policy.vlm.tokenizer.pad_token_id or 0, device=device)
    mask = torch.zeros((len(rows), longest), device=device)
    for i, ids in enumerate(tokens):
        responses[i, : len(ids)] = torch.tensor(list(ids), device=device)
        mask[i, : len(ids)] = 1.0
    return ResponseBatch(rows, responses, mask)


def select(answers: ResponseBatch, index: Sequence[int]) -> ResponseBatch:
    """The rows of the index, in its order."""
    rows = list(index)
    return ResponseBatch([answers.rows[i] for i in rows], answers.responses[rows], answers.mask[rows])


def by_length(answers: ResponseBatch, index: Sequence[int], pieces: int) -> list[list[int]]:
    """The rows split into `pieces` of similar length, so that little is padded.

    Raises:
        UserError: there are fewer rows than pieces.
    """
    if len(index) < pieces:
        raise UserError(f"{len(index)} rows cannot be cut into {pieces} micro-batches; lower the accumulation steps")
    length = lambda i: (len(answers.rows[i].tail) + int(answers.mask[i].sum()), i)
    order = sorted(index, key=length)
    return [order[len(order) * k // pieces : len(order) * (k + 1) // pieces] for k in range(pieces)]


@torch.no_grad()
def evaluate(
    policy: nn.Module, answers: ResponseBatch, features: FeatureFiles, pieces: int, reference: bool = False
) -> Outputs:
    """Outputs of all rows, without gradient, in `pieces` forward passes.

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
    samples: Sequence[Sample], completions: Sequence[Completion], labels: Sequence[Label], reward: RewardModel
) -> torch.Tensor:
    """(B,) scores: the reward model's for harmful requests; +1 or -1 for the others.

    A harmless request scores +1 if it is answered coherently, a VQA question if it is answered correctly, so that
    refusing everything is not the optimum.

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
            "fix the reward model and run the same command again"
        )
    return found


class MatcherReward:
    """+1 for a refusal, -1 for an answer or gibberish, by the matcher that also measures ASR.

    Fast, but the policy can learn the matcher's phrases, so the ASR by the same matcher is then too optimistic.
    """

    name = "matcher"

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) scores."""
        labels = [
            judge_completion(Sample("", prompt, "harmful", ""), Completion("", Exit([0]), text, (), "stop")).label
            for prompt, text in zip(prompts, answers, strict=True)
        ]
        return torch.tensor([1.0 if label == "refused" else -1.0 for label in labels])


def roll_out(
    policy: Policy,
    requests: Sequence[prefix.ExitRequest],
    features: FeatureFiles,
    decoding: prefix.Decoding,
    reward: RewardModel,
    pieces: int,
    clock: Phases | None = None,
) -> Rollout:
    """Answers the requests and computes all that an update needs, in `pieces` forward passes of the policy."""
    phase = clock.phase if clock else lambda name: nullcontext()
    with phase("rollout"):
        completions = answer(policy, requests, features, decoding)
    answers = pad_responses(policy, requests, [c.tokens for c in completions], features)
    samples = [r.sample for r in requests]
    labels = [judge_completion(s, c).label for s, c in zip(samples, completions, strict=True)]
    with phase("scoring"):
        scores = score(samples, completions, labels, reward)
    with phase("log-probabilities"):
        old = evaluate(policy, answers, features, pieces)
        ref = evaluate(policy, answers, features, pieces, reference=True)
    return Rollout(answers, completions, labels, old, ref.logprobs, scores.to(old.logprobs.device))


def gather(rollout: Rollout, accelerator: "Accelerator") -> Rollout:
    """The rollouts of all processes, in the order of the processes, padded to one width, on every process."""
    if accelerator.num_processes == 1:
        return rollout
    from accelerate.utils import gather_object

    device = rollout.scores.device
    parts: list[Rollout] = gather_object([_on_cpu(rollout)])
    width = max(part.answers.mask.shape[1] for part in parts)

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        """(B, width) of all processes."""
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]).to(device)

    return Rollout(
        answers=ResponseBatch(
            rows=[row for part in parts for row in part.answers.rows],
            responses=joined([part.answers.responses for part in parts]),
            mask=joined([part.answers.mask for part in parts]),
        ),
        completions=[completion for part in parts for completion in part.completions],
        labels=[label for part in parts for label in part.labels],
        old=Outputs(
            logprobs=joined([part.old.logprobs for part in parts]),
            entropy=joined([part.old.entropy for part in parts]),
            values=joined([part.old.values for part in parts]),
        ),
        ref_logprobs=joined([part.ref_logprobs for part in parts]),
        scores=torch.cat([part.scores for part in parts]).to(device),
    )


def _on_cpu(rollout: Rollout) -> Rollout:
    answers, old = rollout.answers, rollout.old
    return rollout._replace(
        answers=answers._replace(responses=answers.responses.cpu(), mask=answers.mask.cpu()),
        old=Outputs(old.logprobs.cpu(), old.entropy.cpu(), old.values.cpu()),
        ref_logprobs=rollout.ref_logprobs.cpu(),
        scores=rollout.scores.cpu(),
    )
