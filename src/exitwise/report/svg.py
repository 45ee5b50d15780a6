"""The curve over the exits as inline SVG: ASR, utility and over-refusal, and below them the standing of each exit.

Drawn by hand, not by a plotting library: it follows the page's light or dark colours through CSS classes, weighs a few
kilobytes, and its bytes depend on the metrics alone. Numbers and the words of the tables below are all that gets in,
save for the `notes`, which are escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from ..run.exit import Exit

SERIES = {"asr": "ASR", "utility": "Utility", "over_refusal": "Over-refusal"}
"""Metric key to its name."""

ICONS = {"default": "◆", "less safe": "✕", "may stop": "✓", "no less safe": "≈", "undecided": "?"}
"""Mark of an exit to its sign: the strip must be readable without colours. The mark is the standing, or "may stop"
where an exit is no less safe and as useful too."""

CHANGES = {"better": "✓", "worse": "✕", "not shown": "≈"}
"""The same for what changed at an exit between two runs."""

STRIP = 26
BELOW = 74
"""Room under the plot: numbers of the exits, the strip, the caption."""
LETTER = 7.8
"""Width of a letter of the strip's text, roughly; a label that would not fit is left to its sign."""


@dataclass(frozen=True)
class Plot:
    """Where things lie, in the units of the viewBox."""

    name: str
    """Prefix of the ids, as one page holds a wide and a narrow curve."""
    width: int
    height: int
    n_blocks: int
    left: int = 46
    right: int = 6
    top: int = 30

    @property
    def bottom(self) -> int:
        return self.height - BELOW

    @property
    def cell(self) -> float:
        """Width of one exit."""
        return (self.width - self.left - self.right) / (self.n_blocks + 1)

    def x(self, exit: float) -> float:
        """Middle of an exit's cell."""
        return self.left + (exit + 0.5) * self.cell

    def y(self, share: float) -> float:
        return self.bottom - share * (self.bottom - self.top)


def curve(
    name: str, metrics: Mapping[str, Any], notes: Mapping[int, str], label: str, size: tuple[int, int] = (1120, 372)
) -> Markup:
    """The figure for `metrics` (metrics.json, each exit with its `mark`); the pointer on an exit shows its note.

    Fused exits have no place on the axis of blocks; the tables name them.
    """
    plot = Plot(name, *size, metrics["n_blocks"])
    exits = sorted((row for row in metrics["exits"] if not Exit.of(row["exit"]).is_set), key=lambda row: row["exit"])
    parts = [
        *_columns(plot, exits),
        *_axes(plot, [row["exit"] for row in exits]),
        *_default_line(plot, metrics["default_exit"]),
        *_band(plot, exits, "asr"),
    ]
    for key in ("utility", "over_refusal", "asr"):
        parts += _series(plot, exits, key)
    parts += [*_strip(plot, exits), *_hover(plot, {e: note for e, note in notes.items() if not Exit.of(e).is_set})]
    return Markup(
        f'<svg class="curve {name}" viewBox="0 0 {plot.width} {plot.height}" role="img" aria-label="{escape(label)}">'
        f'<defs><pattern id="{name}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="hatch" width="2" height="6"/></pattern></defs>'
        f"{''.join(parts)}</svg>"
    )


def change_curve(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    default_exit: int,
    n_blocks: int,
    label: str,
    size: tuple[int, int],
    screen: str = "",
) -> Markup:
    """One share at each exit in two runs: dotted before, solid after.

    Args:
        name: the metric's key, which has a colour in the page's style.
        rows: {exit, before, after, mark, note}: intervals, a mark of CHANGES, and what the pointer shows.
        screen: "wide" or "narrow" where it is drawn for one kind of screen only.
    """
    plot = Plot(name, *size, n_blocks)
    rows = sorted((row for row in rows if not Exit.of(row["exit"]).is_set), key=lambda row: row["exit"])
    parts = [*_axes(plot, [row["exit"] for row in rows]), *_default_line(plot, default_exit)]
    for which in ("before", "after"):
        parts += [band.replace('class="band', f'class="band {name}') for band in _band(plot, rows, which)]
        for run in _runs(rows, which):
            points = [(plot.x(exit), plot.y(value["value"])) for exit, value in run]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path class="line {name} {which}" d="M{path}"/>')
            parts += [f'<circle class="mark {name} {which}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in points]
    parts += [*_strip(plot, rows, CHANGES), *_hover(plot, {row["exit"]: row["note"] for row in rows})]
    classes = f"curve change {screen}".rstrip()
    return Markup(
        f'<svg class="{classes}" viewBox="0 0 {plot.width} {plot.height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def change_key(which: str) -> Markup:
    """Line and marker of "before" or "after", for the legend."""
    return Markup(
        '<svg class="key change" viewBox="0 0 36 14" width="36" height="14" aria-hidden="true">'
        f'<path class="line asr {which}" d="M0 7H36"/><circle class="mark asr {which}" cx="18" cy="7" r="4.5"/></svg>'
    )


def key(metric: str) -> Markup:
    """Line and marker of a metric, for the legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 36 14" width="36" height="14" aria-hidden="true">'
        f'<path class="line {metric}" d="M0 7H36"/>{_marker(metric, 18, 7)}</svg>'
    )


def _marker(metric: str, x: float, y: float) -> str:
    if metric == "asr":
        return f'<circle class="mark asr" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if metric == "utility":
        return f'<rect class="mark utility" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    return f'<path class="mark over_refusal" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'


def _columns(plot: Plot, exits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A tint behind the exits that are less safe."""
    for mark, first, last in _segments(exits):
        if mark == "less safe":
            yield (
                f'<rect class="tint" x="{plot.x(first - 0.5):.1f}" y="{plot.top}" '
                f'width="{(last - first + 1) * plot.cell:.1f}" height="{plot.bottom - plot.top}"/>'
            )


def _axes(plot: Plot, exits: Sequence[int]) -> Iterator[str]:
    for percent in (0, 25, 50, 75, 100):
        y = plot.y(percent / 100)
        yield f'<path class="grid" d="M{plot.left} {y:.1f}H{plot.width - plot.right}"/>'
        yield f'<text class="tick" x="{plot.left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
    step = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if n * plot.cell >= 22)
    for exit in range(0, plot.n_blocks + 1, step):
        kind = "tick" if exit in exits else "tick absent"
        yield f'<text class="{kind}" x="{plot.x(exit):.1f}" y="{plot.bottom + 18}" text-anchor="middle">{exit}</text>'
    caption = "exit = encoder blocks run before the device stops"
    middle = plot.x(plot.n_blocks / 2)
    yield f'<text class="tick" x="{middle:.1f}" y="{plot.height - 4}" text-anchor="middle">{caption}</text>'


def _default_line(plot: Plot, exit: int) -> Iterator[str]:
    x = plot.x(exit)
    anchor = "end" if x > plot.width / 2 else "start"
    yield f'<path class="default-line" d="M{x:.1f} {plot.top - 6}V{plot.bottom}"/>'
    yield (
        f'<text class="default-label" x="{x + (8 if anchor == "end" else -8):.1f}" y="{plot.top - 12}" '
        f'text-anchor="{anchor}">◆ default exit {exit}</text>'
    )


def _runs(exits: Sequence[Mapping[str, Any]], metric: str) -> Iterator[list[tuple[int, Mapping[str, float]]]]:
    """Stretches of neighbouring exits at which the metric was measured: no line, no band where nobody looked."""
    measured = [(row["exit"], row[metric]) for row in exits if row[metric]["value"] is not None]
    for _, run in groupby(enumerate(measured), key=lambda pair: pair[1][0] - pair[0]):
        yield [point for _, point in run]


def _band(plot: Plot, exits: Sequence[Mapping[str, Any]], metric: str) -> Iterator[str]:
    for run in _runs(exits, metric):
        above = [f"{plot.x(exit):.1f} {plot.y(value['high']):.1f}" for exit, value in run]
        below = [f"{plot.x(exit):.1f} {plot.y(value['low']):.1f}" for exit, value in reversed(run)]
        yield f'<path class="band {metric}" d="M{"L".join(above + below)}z"/>'


def _series(plot: Plot, exits: Sequence[Mapping[str, Any]], metric: str) -> Iterator[str]:
    """Line, whiskers, markers. The three metrics stand a little apart, so that no whisker hides another."""
    shift = {"asr": 0, "utility": -1, "over_refusal": 1}[metric] * min(5.0, plot.cell * 0.16)
    for run in _runs(exits, metric):
        points = [(plot.x(exit) + shift, value) for exit, value in run]
        path = "L".join(f"{x:.1f} {plot.y(value['value']):.1f}" for x, value in points)
        yield f'<path class="line {metric}" d="M{path}"/>'
        for x, value in points:
            low, high = plot.y(value["low"]), plot.y(value["high"])
            yield f'<path class="whisker {metric}" d="M{x:.1f} {high:.1f}V{low:.1f}"/>'
            yield _marker(metric, x, plot.y(value["value"]))


def _segments(exits: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """(mark, first exit, last exit) of neighbouring exits with one mark."""
    for (mark, _), rows in groupby(enumerate(exits), key=lambda pair: (pair[1]["mark"], pair[1]["exit"] - pair[0])):
        numbers = [row["exit"] for _, row in rows]
        yield mark, numbers[0], numbers[-1]


def _strip(plot: Plot, exits: Sequence[Mapping[str, Any]], icons: Mapping[str, str] = ICONS) -> Iterator[str]:
    y = plot.bottom + 27
    yield f'<path class="unaudited" d="M{plot.left} {y + STRIP / 2}H{plot.width - plot.right}"/>'
    for mark, first, last in _segments(exits):
        x, width = plot.x(first - 0.5) + 1, (last - first + 1) * plot.cell - 2
        kind = mark.replace(" ", "-")
        box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{STRIP}" rx="3"'
        yield f'<rect class="seg {kind}" {box}/>'
        if mark == "undecided":
            yield f'<rect {box} fill="url(#{plot.name}-hatch)"/>'
        text = f"{icons[mark]} {mark}"
        text = text if len(text) * LETTER < width else icons[mark]
        middle = x + width / 2
        yield f'<text class="seg-text {kind}" x="{middle:.1f}" y="{y + 18}" text-anchor="middle">{text}</text>'


def _hover(plot: Plot, notes: Mapping[int, str]) -> Iterator[str]:
    for exit, note in notes.items():
        yield (
            f'<rect class="hover" x="{plot.x(exit - 0.5):.1f}" y="{plot.top}" width="{plot.cell:.1f}" '
            f'height="{plot.bottom - plot.top}"><title>{escape(note)}</title></rect>'
        )
