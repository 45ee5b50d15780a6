"""Joins what each exit costs (costs.json) with its figures (metrics.json), and finds the exits that others dominate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UserError
from ..model.exit_names import ranges
from ..run.exit import Exit
from ..run.figures import ExitFigures, Interval
from ..run.run import Run
from ..run.typed import from_json


@dataclass(frozen=True)
class Quartiles:
    """Seconds of repeated passes."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class CostsOfExit:
    """What a request costs at an exit, by part of the model and in total."""

    exit: Exit
    parameters: dict[str, int]
    bytes: dict[str, int]
    flops: dict[str, int]
    seconds: dict[str, Quartiles] | None
    """None where latency was not measured."""


@dataclass(frozen=True)
class RequestSize:
    """The request that was measured, in tokens."""

    tokens: int
    image_tokens: int


@dataclass(frozen=True)
class CostsFile:
    """costs.json of a run."""

    default_exit: Exit
    request: RequestSize
    repetitions: int
    exits: list[CostsOfExit]
    device: str = ""
    dtype: str = ""
    threads: int | None = None


@dataclass(frozen=True)
class ExitTradeoff:
    """What an exit costs and saves, beside its ASR and utility.

    Attributes:
        saved: 1 - FLOPs of the request at this exit / FLOPs at the default exit.
        share: the encoder's part of the request's FLOPs.
        by: exits that dominate this one; None where a figure is missing that others have.
    """

    exit: Exit
    costs: CostsOfExit
    asr: Interval
    utility: Interval
    saved: float
    share: float
    by: tuple[Exit, ...] | None


@dataclass(frozen=True)
class Tradeoffs:
    """All exits of a run. `front`: exits that none dominates; `of`: the quantities that dominance compares."""

    rows: list[ExitTradeoff]
    front: list[Exit]
    of: str
    sentence: str


class Point(NamedTuple):
    """An exit as dominance sees it: shares, as point estimates."""

    exit: Exit
    saved: float
    asr: float
    utility: float


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` saves at least as much, has no higher ASR, no lower utility, and is strictly better in one."""
    no_worse = one.saved >= other.saved and one.asr <= other.asr and one.utility >= other.utility
    return no_worse and one[1:] != other[1:]


def dominated(points: Iterable[Point]) -> dict[Exit, tuple[Exit, ...]]:
    """{exit: exits that dominate it}; () for the exits of the Pareto front."""
    points = list(points)
    return {p.exit: tuple(sorted(q.exit for q in points if dominates(q, p))) for p in points}


def read_costs(run: Run) -> CostsFile | None:
    """costs.json; None for a run without costs.

    Raises:
        UserError: it is broken.
    """
    value = run.read_object("costs.json")
    advice = "restore it, or delete it to do without costs"
    return None if value is None else from_json(value, CostsFile, run.path / "costs.json", advice)


def join(costs: CostsFile, exits: Sequence[ExitFigures], stop_at: Iterable[Exit]) -> Tradeoffs:
    """The exits of a run's metrics with what they cost and save, and the exits that dominate them.

    Where no exit has a utility, dominance is of compute and ASR alone.

    Args:
        stop_at: exits at which the device may stop.

    Raises:
        UserError: the costs belong to another run, without one of its exits.
    """
    by_exit = {row.exit: row for row in costs.exits}
    absent = {costs.default_exit, *(row.exit for row in exits)} - by_exit.keys()
    if absent:
        raise UserError(f"costs.json lacks {_exits(sorted(absent))}; restore it, or delete it to do without costs")
    whole = by_exit[costs.default_exit].flops["total"]
    saved = {row.exit: 1 - row.flops["total"] / whole for row in costs.exits}
    useful = any(row.utility.value is not None for row in exits)
    by = dominated(
        Point(row.exit, saved[row.exit], row.asr.value, row.utility.value or 0.0 if useful else 0.0)
        for row in sorted(exits, key=lambda row: row.exit)
        if row.asr.value is not None and not (useful and row.utility.value is None)
    )
    rows = [
        ExitTradeoff(
            exit=row.exit,
            costs=by_exit[row.exit],
            asr=row.asr,
            utility=row.utility,
            saved=saved[row.exit],
            share=by_exit[row.exit].flops["encoder"] / by_exit[row.exit].flops["total"],
            by=by.get(row.exit),
        )
        for row in sorted(exits, key=lambda row: row.exit)
    ]
    front = [exit for exit, better in by.items() if not better]
    of = "compute saved, ASR and utility" if useful else "compute saved and ASR (utility was not measured)"
    return Tradeoffs(rows, front, of, _sentence(front, by, stop_at))


def _sentence(front: list[Exit], by: Mapping[Exit, tuple[Exit, ...]], stop_at: Iterable[Exit]) -> str:
    """Which exits no other one dominates, and at which of them a device may stop."""
    if not by:
        return "No exit has the figures that dominance compares."
    good = sorted(set(front) & set(stop_at))
    may = f"the device may stop at {_exits(good)}" if good else "none is cleared for an early stop"
    beaten = sorted(set(by) - set(front))
    return f"Not dominated: {_exits(front)}. Of these, {may}." + (f" Dominated: {_exits(beaten)}." if beaten else "")


def _exits(exits: Iterable[Exit]) -> str:
    exits = list(exits)
    return f"{'exit' if len(exits) == 1 else 'exits'} {ranges(exits)}"
