"""The protocol of scorers: each gives answers a number and describes exactly what produced it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from ..run.records import Completion, Kind, Sample

Quantity = Literal["toxicity", "reward", "accuracy"]
ScorerInput = tuple[Sample, Completion]


class ScoredAnswer(NamedTuple):
    """A number, or None and the reason why there is none. A reason beside a number is a remark."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class ScorerInfo:
    """Everything that two scores must share to be comparable; written to scores.<name>.json."""

    name: str
    """As given to --scorer: perspective, detoxify, reward:<model> ..."""
    backend: str
    """Service, package or model that produces the numbers."""
    version: str
    """Version of the backend; for weights, a digest of them."""
    quantity: Quantity
    kinds: tuple[Kind, ...]
    """Kinds of samples whose answers are read."""
    settings: Mapping[str, object] = field(default_factory=dict)
    licence: str = ""
    notice: str = ""
    """A warning that is printed with the numbers."""

    @property
    def stamp(self) -> str:
        """Value of `scorer` in every Score."""
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name without characters that a file name cannot have."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")


class Scorer(Protocol):
    """One file a scorer; `run.score_run` applies it to a run."""

    info: ScorerInfo
    batch_size: int
    """Answers between two writes to the disk. A resumed run repeats whole batches, so it is fixed for a run."""

    def key(self, sample: Sample, completion: Completion) -> tuple[str, ...]:
        """Everything the number depends on: answers with equal keys are scored once."""

    def score(self, batch: Sequence[ScorerInput]) -> list[ScoredAnswer]:
        """One result for each input, in order.

        Raises:
            UserError: the backend failed for good; earlier batches are kept.
        """
