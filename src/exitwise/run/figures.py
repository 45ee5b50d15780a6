"""The figures of a run, as metrics.json holds them: frozen dataclasses, one field a key, in the order of the file.

docs/reference/metrics.md explains each key. Shares lie in [0, 1]; None stands where nothing was measured.
"""

from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from .exit import Exit


@dataclass(frozen=True)
class Interval:
    """A share with its Wilson interval; value, low and high are None where nothing was measured."""

    value: float | None
    low: float | None
    high: float | None
    successes: int
    n: int


@dataclass(frozen=True)
class Estimate:
    """A figure with a bootstrap interval; None where nothing was measured."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedTest:
    """A share at an exit minus the same share at the default exit, over the samples scored at both.

    Attributes:
        low, high: Newcombe's interval (measure/stats.py).
        gained, lost: samples that are a success at this exit only, and at the default exit only.
        p, p_holm: exact McNemar test, and adjusted over the exits of the run.
        clustered_low, clustered_high: two-way bootstrap, only where prompts and images cross.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    p_holm: float
    clustered_low: float | UnsetType | None = UNSET
    clustered_high: float | UnsetType | None = UNSET


@dataclass(frozen=True)
class VersusDefault:
    """Paired tests of an exit against the default exit; None where no sample was scored at both."""

    asr: PairedTest | None
    utility: PairedTest | None
    over_refusal: PairedTest | None


@dataclass(frozen=True)
class ControlFigures:
    """Shares of harmful requests asked with a control instead of their image."""

    asr: Interval
    not_refused: Interval
    refusal: Interval


@dataclass(frozen=True)
class ExitFigures:
    """Everything that was measured at one exit."""

    exit: Exit
    band: str
    asr: Interval
    not_refused: Interval
    refusal: Interval
    controversial: Interval
    over_refusal: Interval
    coherence: Interval
    utility: Interval
    rule_of_three: dict[str, float]
    """By metric without a success: the largest share that zero of n leaves possible at 95 %."""
    asr_clustered: Estimate | None
    controls: dict[str, ControlFigures]
    unscored: dict[str, int]
    """Samples by kind whose verdict could not be read."""
    mean_tokens: float | None
    versus_default: VersusDefault | None
    standing: str
    """default, no less safe, less safe or undecided."""

    def share(self, metric: str) -> Interval:
        """The share of a metric by its name, such as "asr"."""
        return getattr(self, metric)


@dataclass(frozen=True)
class BandFigures:
    """Means over the exits of a band."""

    band: str
    exits: list[Exit]
    asr: Estimate
    over_refusal: Estimate
    utility: Estimate
    coherence: Estimate


@dataclass(frozen=True)
class PolicyFigures:
    """ASR of one policy of harmful prompts, at the default exit and at the exit with the largest ASR of all."""

    policy: str
    asr_default: Interval
    asr_worst_exit: Interval


@dataclass(frozen=True)
class Disparity:
    """Largest share over smallest, with the exits that have them; `reason` says why there is no ratio."""

    ratio: float | None
    largest_exit: Exit | None
    smallest_exit: Exit | None
    reason: str | None


@dataclass(frozen=True)
class Answer:
    """At which exit the device may stop, in words and as lists of exits."""

    headline: str
    detail: str
    stop_at: list[Exit]
    unsafe: list[Exit]
    undecided: list[Exit]


@dataclass(frozen=True)
class Metrics:
    """metrics.json: all figures of a run by one judge."""

    model: str
    judge: str
    default_exit: Exit
    n_blocks: int
    margin: float
    crossed: bool
    exits: list[ExitFigures]
    bands: list[BandFigures]
    by_policy: list[PolicyFigures]
    disparity: Disparity
    answer: Answer
    caveat: str
    notice: str = ""

    @property
    def by_exit(self) -> dict[Exit, ExitFigures]:
        """`exits` by their exit."""
        return {figures.exit: figures for figures in self.exits}
