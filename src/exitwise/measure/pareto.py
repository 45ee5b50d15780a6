"""Costs beside figures: what each exit saves, and which exits another one beats in compute, safety and usefulness.

costs.json is measured (costs.py), metrics.json judged (metrics.py), and neither depends on the other. This joins them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..model.exit_names import ranges
from ..run import directory
from ..run.exit import Exit


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


def read_costs(folder: Path) -> dict[str, Any] | None:
    """costs.json of a run directory; None for a run that was made without.

    Raises:
        UserError: it is broken.
    """
    path = folder / "costs.json"
    return directory.read_json(path, "exits", "default_exit", "request", "repetitions") if path.exists() else None


def join(costs: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The exits of `metrics` with what they cost and save, and who dominates them.

    `saved` = 1 - FLOPs of the request at the exit / FLOPs at the default exit; `share` = the encoder's part of the
    request's FLOPs. `by`: the exits that dominate this one, None where a figure is missing that others have. Where no
    exit has a utility, dominance is of compute and ASR alone (`of`).

    Raises:
        UserError: the costs are of another run, without one of its exits.
    """
    by_exit = {row["exit"]: row for row in costs["exits"]}
    absent = {costs["default_exit"], *(row["exit"] for row in metrics["exits"])} - by_exit.keys()
    if absent:
        raise UserError(f"costs.json lacks {_exits(sorted(absent))}; restore it, or delete it to do without costs")
    whole = by_exit[costs["default_exit"]]["flops"]["total"]
    rows = [
        {
            **by_exit[figures["exit"]],
            "asr": figures["asr"],
            "utility": figures["utility"],
            "saved": 1 - by_exit[figures["exit"]]["flops"]["total"] / whole,
            "share": by_exit[figures["exit"]]["flops"]["encoder"] / by_exit[figures["exit"]]["flops"]["total"],
        }
        for figures in sorted(metrics["exits"], key=lambda row: row["exit"])
    ]
    useful = any(row["utility"]["value"] is not None for row in rows)
    points = [
        Point(row["exit"], row["saved"], row["asr"]["value"], row["utility"]["value"] if useful else 0.0)
        for row in rows
        if row["asr"]["value"] is not None and not (useful and row["utility"]["value"] is None)
    ]
    by = dominated(points)
    rows = [row | {"by": by.get(row["exit"])} for row in rows]
    front = [exit for exit, better in by.items() if not better]
    return {
        "rows": rows,
        "front": front,
        "of": "compute saved, ASR and utility" if useful else "compute saved and ASR (utility was not measured)",
        "sentence": _sentence(front, by, metrics["answer"]["stop_at"]),
    }


def _sentence(front: list[Exit], by: Mapping[Exit, tuple[Exit, ...]], stop_at: Iterable[Exit]) -> str:
    """Which exits no other one beats, and where among them a device may stop."""
    if not by:
        return "No exit has the figures that dominance compares."
    good = sorted(set(front) & set(stop_at))
    may = f"the device may stop at {_exits(good)}" if good else "none is cleared for an early stop"
    beaten = sorted(set(by) - set(front))
    return f"Not dominated: {_exits(front)}. Of these, {may}." + (f" Dominated: {_exits(beaten)}." if beaten else "")


def _exits(exits: Iterable[Exit]) -> str:
    exits = list(exits)
    return f"{'exit' if len(exits) == 1 else 'exits'} {ranges(exits)}"
