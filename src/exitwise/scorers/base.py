"""What a scorer is: it reads answers and gives each a number, and says exactly what it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from ..run.records import Completion, Kind, Sample

Quantity = Literal["toxicity", "reward", "accuracy"]
Pair = tuple[Sample, Completion]


class Mark(NamedTuple):
    """A number, or None and why there is none. A reason beside a number is a remark."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class About:
    """Everything that makes two numbers of a scorer comparable; lands in scores.<name>.json."""

    name: str
    """As on the command line: perspective, detoxify, reward:<model> ..."""
    backend: str
    """Service, package or model that gives the numbers."""
    version: str
    """Of the backend; for weights, a digest of them."""
    quantity: Quantity
    kinds: tuple[Kind, ...]
    """Kinds of samples whose answers are read."""
    settings: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    notice: str = ""
    """What a reader of the numbers must know."""

    @property
    def stamp(self) -> str:
        """What every Score carries as `scorer`."""
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name without what a file name cannot hold."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")


class Scorer(Protocol):
    """One file a scorer; `run.score_run` does the rest."""

    about: About
    batch_size: int
    """Answers between two writes to the disk. Part of what a resumed run repeats, so fixed for a run."""

    def key(self, sample: Sample, completion: Completion) -> tuple[str, ...]:
        """All that the number depends on: answers alike in it are scored once."""

    def score(self, batch: Sequence[Pair]) -> list[Mark]:
        """One mark a pair, in order.

        Raises:
            UserError: the backend cannot go on; what was scored before is kept.
        """
