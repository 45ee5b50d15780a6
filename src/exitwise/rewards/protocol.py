"""What a reward model offers: a number for a prompt and its answer, higher for what people prefer.

Shapes: B answers.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ..errors import UserError

MAX_TOKENS = 4096
"""Tokens of a scoring micro-batch, padding included."""


class RewardModel(Protocol):
    """Scores answers."""

    name: str
    """For messages and reports."""

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) float32 on the CPU, higher is better; row i depends on prompts[i] and answers[i] alone.

        Raises:
            ScoreError: a score is not finite.
        """
        ...


class LogitRewardModel(RewardModel, Protocol):
    """A reward model whose unnormalised scores are at hand."""

    def logits(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) scores before shift and scale: their differences are log odds under Bradley and Terry's model.

        Raises:
            ScoreError: one of them is not finite.
        """
        ...


class ScoreError(UserError):
    """A reward model returned a score that is not finite. A training loop stops here and keeps its last checkpoint.

    Attributes:
        index: of the answer among those scored.
    """

    def __init__(self, name: str, index: int, prompt: str, score: float):
        self.index = index
        super().__init__(
            f"the reward model {name} gave {score} for answer {index} (prompt {prompt[:60]!r}); expected finite "
            "scores; check its weights, or load it in another dtype"
        )


def require_finite(name: str, prompts: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
    """Returns the (B,) scores; raises ScoreError naming the first that is not finite."""
    for i in (~torch.isfinite(scores)).nonzero().flatten().tolist()[:1]:
        raise ScoreError(name, i, prompts[i], float(scores[i]))
    return scores


def micro_batches(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Indices in batches of similar length: rows x longest row is at most `max_tokens`, or the batch has one row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
