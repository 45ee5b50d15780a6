"""The figures of a comparison, as compare.json holds them: frozen dataclasses, in the order of the file.

docs/reference/comparison.md explains each key. Every difference is AFTER minus BEFORE; shares lie in [0, 1].
"""

from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET, UnsetType

from ..measure.stats import SIGNIFICANCE
from ..run.exit import Exit
from ..run.figures import Interval
from ..run.records import Kind
from ..run.typed import Json, to_json


@dataclass(frozen=True)
class ComparedMetric:
    """One compared figure: a share of labels, or the mean of a scorer's values."""

    key: str
    name: str
    unit: Literal["share", "score"]
    better: Literal["lower", "higher", ""]
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class MeanValue:
    """A mean over samples, and over exits where there are several."""

    value: float | None


@dataclass(frozen=True)
class Change:
    """A metric before and after, and the difference of the two.

    Attributes:
        low, high: 95 % interval of the difference; None where the data allow none.
        gained, lost: at one exit, pairs that are a success only after, and only before.
        n: at one exit, pairs that both runs have scored.
        p, p_holm: at one exit, exact McNemar test of a share, and adjusted over the exits.
    """

    before: Interval | MeanValue
    after: Interval | MeanValue
    difference: float
    low: float | None
    high: float | None
    gained: int | UnsetType = UNSET
    lost: int | UnsetType = UNSET
    n: int | UnsetType = UNSET
    p: float | UnsetType = UNSET
    p_holm: float | UnsetType = UNSET

    @property
    def is_tested(self) -> bool:
        """Whether McNemar's test was made: for shares at one exit."""
        return self.p_holm is not UNSET

    @property
    def is_shown(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def is_significant(self) -> bool:
        """Whether the adjusted McNemar test rejects equality and the interval excludes zero.

        Both are needed where prompts and images cross: McNemar's test treats every answer as a prompt of its own.
        """
        return isinstance(self.p_holm, float) and self.p_holm < SIGNIFICANCE and self.is_shown


Changes = dict[str, Change | None]
"""By metric; None where no sample was scored in both runs."""


@dataclass(frozen=True)
class UnscoredCounts:
    """Answers without a usable verdict, by kind of sample."""

    before: dict[Kind, int]
    after: dict[Kind, int]


@dataclass(frozen=True)
class ExitChanges:
    """What changed at one exit. `moves`: harmful samples by their label before, then by their label after."""

    exit: Exit
    band: str
    group: str | None
    changes: Changes
    moves: dict[str, dict[str, int]]
    unscored: UnscoredCounts


@dataclass(frozen=True)
class MeanChanges:
    """Means over the exits of a band or of a group, such as the trained exits."""

    name: str
    exits: tuple[Exit, ...]
    changes: Changes


@dataclass(frozen=True)
class RunIdentity:
    """A run of the comparison: its directory, model and adapter."""

    run: str
    model: str
    adapter: str | None


@dataclass(frozen=True)
class AdapterInfo:
    """What the alignment recorded of its adapter: the method, the exits it trained at, and those it held out."""

    method: str
    exits: tuple[Exit, ...]
    held_out: tuple[Exit, ...]


@dataclass(frozen=True)
class AnswerCounts:
    """Answers that both runs have, and how many of them differ in their text."""

    n: int
    changed: int


@dataclass(frozen=True)
class ComparisonFigures:
    """compare.json without its `verdict`."""

    before: RunIdentity
    after: RunIdentity
    judge: str
    default_exit: Exit
    n_blocks: int
    seed: int
    crossed: bool
    exits: tuple[Exit, ...]
    adapter_info: AdapterInfo | None
    metrics: tuple[ComparedMetric, ...]
    answers: AnswerCounts
    by_exit: tuple[ExitChanges, ...]
    bands: tuple[MeanChanges, ...]
    groups: tuple[MeanChanges, ...]
    notes: tuple[str, ...]
    caveat: str

    def group(self, name: str) -> MeanChanges | None:
        """The group of exits with this name, None where there is none."""
        return next((row for row in self.groups if row.name == name), None)

    def metric(self, key: str) -> ComparedMetric:
        return next(metric for metric in self.metrics if metric.key == key)

    def to_json(self) -> dict[str, Json]:
        """As compare.json holds them: each metric is a key of its row."""
        found = to_json(self)
        for key, name in (("by_exit", "exit"), ("bands", "band"), ("groups", "group")):
            found[key] = [_flat(row, name) for row in found[key]]  # type: ignore[union-attr, arg-type]
        return found


def _flat(row: dict[str, Json], name: str) -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for key, value in row.items():
        flat |= value if isinstance(value, dict) and key == "changes" else {name if key == "name" else key: value}
    return flat


@dataclass(frozen=True)
class Failure:
    """A named failure, and where and by how much it was seen."""

    name: str
    text: str


@dataclass(frozen=True)
class ComparisonVerdict:
    """The conclusion of a comparison.

    Attributes:
        focus: the group of exits that `sentence` is about.
        nothing_changed: whether all answers and figures are equal.
        detail: further sentences.
    """

    sentence: str
    focus: str
    nothing_changed: bool
    failures: tuple[Failure, ...]
    detail: tuple[str, ...]
