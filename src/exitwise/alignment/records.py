"""Lines of metrics.jsonl and answers.jsonl."""

import json
from dataclasses import dataclass
from typing import Self

Metrics = dict[str, float | None]
"""{metric key (docs/reference/training-metrics.md): value}; None where a batch has no prompt of that kind."""

AnswerLine = dict[str, str | float]
"""A line of answers.jsonl. The text is hostile: never render it."""


@dataclass(frozen=True)
class StepRecord:
    """A line of metrics.jsonl."""

    metrics: Metrics
    """With `step`, counted from 1."""
    signatures: tuple[str, ...]
    """Names of the failure signatures that the steps up to this one show."""

    def to_json(self) -> str:
        """One line, the metrics first."""
        return json.dumps(self.metrics | {"signatures": list(self.signatures)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The record of a line."""
        metrics = json.loads(line)
        return cls(metrics, tuple(metrics.pop("signatures")))
