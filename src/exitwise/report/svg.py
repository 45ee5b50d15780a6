"""Draws the curve over the exits as inline SVG: ASR, utility, over-refusal, and the standing of each exit below.

It is written without a plotting library: CSS classes give it the page's light or dark colours, it has a few kilobytes,
and its bytes depend on the figures alone. Notes are escaped; all other text is fixed or a number.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup, escape

from ..run.exit import Exit
from ..run.figures import Interval

SERIES = {"asr": "ASR", "utility": "Utility", "over_refusal": "Over-refusal"}
"""Metric key to its name."""

ICONS = {"default": "◆", "less safe": "✕", "may stop": "✓", "no less safe": "≈", "undecided": "?"}
"""Mark of an exit to its symbol, so that the strip is readable without colours. The mark is the standing, or "may stop"
for an exit that is no less safe and also as useful."""

CHANGES = {"better": "✓", "worse": "✕", "not shown": "≈"}
"""Mark of a change at an exit between two runs to its symbol."""

STRIP = 26
BELOW = 74
"""Space below the plot for the exit numbers, the strip and the caption."""
LETTER = 7.8
"""Approximate width of a letter in the strip; a label that does not fit is replaced by its symbol."""


@dataclass(frozen=True)
class Plot:
    """Places in the drawing, in the units of the viewBox."""

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


class CurvePoint(NamedTuple):
    """An exit on a curve."""

    exit: int
    mark: str
    """A key of ICONS, or of CHANGES where two runs are compared."""
    shares: Mapping[str, Interval]
    """By series: a key of SERIES, or "before" and "after"."""
    note: str
    """Text shown when the pointer is on the exit."""


def curve(
    name: str,
    points: Sequence[CurvePoint],
    default_exit: Exit,
    n_blocks: int,
    label: str,
    size: tuple[int, int] = (1120, 372),
) -> Markup:
    """ASR, utility and over-refusal by exit.

    Args:
        name: prefix of the ids, also a class.
        points: in the order of the exits. Fused exits have no place on the axis of blocks; the tables name them.
        label: description for screen readers.
    """
    plot = Plot(name, *size, n_blocks)
    parts = [
        *_columns(plot, points),
        *_axes(plot, [point.exit for point in points]),
        *_default_line(plot, default_exit),
        *_band(plot, points, "asr"),
    ]
    for key in ("utility", "over_refusal", "asr"):
        parts += _series(plot, points, key)
    parts += [*_strip(plot, points, ICONS), *_hover(plot, points)]
    return Markup(
        f'<svg class="curve {name}" viewBox="0 0 {plot.width} {plot.height}" role="img" aria-label="{escape(label)}">'
        f'<defs><pattern id="{name}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="hatch" width="2" height="6"/></pattern></defs>'
        f"{''.join(parts)}</svg>"
    )


def change_curve(
    name: str,
    points: Sequence[CurvePoint],
    default_exit: Exit,
    n_blocks: int,
    label: str,
    size: tuple[int, int],
    screen: str = "",
) -> Markup:
    """One share by exit in two runs: a dotted line before, a solid line after.

    Args:
        name: the metric's key, which has a colour in the page's style.
        screen: "wide" or "narrow" for a drawing that is shown on one kind of screen only.
    """
    plot = Plot(name, *size, n_blocks)
    parts = [*_axes(plot, [point.exit for point in points]), *_default_line(plot, default_exit)]
    for which in ("before", "after"):
        parts += [band.replace('class="band', f'class="band {name}') for band in _band(plot, points, which)]
        for run in _runs(points, which):
            places = [(plot.x(exit), plot.y(share.value)) for exit, share in run]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path class="line {name} {which}" d="M{path}"/>')
            parts += [f'<circle class="mark {name} {which}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in places]
    parts += [*_strip(plot, points, CHANGES), *_hover(plot, points)]
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


def _columns(plot: Plot, points: Sequence[CurvePoint]) -> Iterator[str]:
    """A tint behind the exits that are less safe."""
    for mark, first, last in _segments(points):
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


def _default_line(plot: Plot, exit: Exit) -> Iterator[str]:
    if exit.is_set:  # has no place on the axis of blocks
        return
    x = plot.x(int(exit))
    anchor = "end" if x > plot.width / 2 else "start"
    yield f'<path class="default-line" d="M{x:.1f} {plot.top - 6}V{plot.bottom}"/>'
    yield (
        f'<text class="default-label" x="{x + (8 if anchor == "end" else -8):.1f}" y="{plot.top - 12}" '
        f'text-anchor="{anchor}">◆ default exit {exit}</text>'
    )


class _Measured(NamedTuple):
    value: float
    low: float
    high: float


def _runs(points: Sequence[CurvePoint], series: str) -> Iterator[list[tuple[int, _Measured]]]:
    """Stretches of consecutive exits at which the share was measured; no line or band is drawn between them."""
    measured = []
    for point in points:
        share = point.shares[series]
        if share.value is not None and share.low is not None and share.high is not None:
            measured.append((point.exit, _Measured(share.value, share.low, share.high)))
    for _, run in groupby(enumerate(measured), key=lambda pair: pair[1][0] - pair[0]):
        yield [point for _, point in run]


def _band(plot: Plot, points: Sequence[CurvePoint], series: str) -> Iterator[str]:
    for run in _runs(points, series):
        above = [f"{plot.x(exit):.1f} {plot.y(share.high):.1f}" for exit, share in run]
        below = [f"{plot.x(exit):.1f} {plot.y(share.low):.1f}" for exit, share in reversed(run)]
        yield f'<path class="band {series}" d="M{"L".join(above + below)}z"/>'


def _series(plot: Plot, points: Sequence[CurvePoint], series: str) -> Iterator[str]:
    """Line, whiskers, markers. The three series are shifted slightly, so that no whisker hides another."""
    shift = {"asr": 0, "utility": -1, "over_refusal": 1}[series] * min(5.0, plot.cell * 0.16)
    for run in _runs(points, series):
        places = [(plot.x(exit) + shift, share) for exit, share in run]
        path = "L".join(f"{x:.1f} {plot.y(share.value):.1f}" for x, share in places)
        yield f'<path class="line {series}" d="M{path}"/>'
        for x, share in places:
            low, high = plot.y(share.low), plot.y(share.high)
            yield f'<path class="whisker {series}" d="M{x:.1f} {high:.1f}V{low:.1f}"/>'
            yield _marker(series, x, plot.y(share.value))


def _segments(points: Sequence[CurvePoint]) -> Iterator[tuple[str, int, int]]:
    """(mark, first exit, last exit) of consecutive exits with one mark."""
    for (mark, _), group in groupby(enumerate(points), key=lambda pair: (pair[1].mark, pair[1].exit - pair[0])):
        numbers = [point.exit for _, point in group]
        yield mark, numbers[0], numbers[-1]


def _strip(plot: Plot, points: Sequence[CurvePoint], icons: Mapping[str, str]) -> Iterator[str]:
    y = plot.bottom + 27
    yield f'<path class="unaudited" d="M{plot.left} {y + STRIP / 2}H{plot.width - plot.right}"/>'
    for mark, first, last in _segments(points):
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


def _hover(plot: Plot, points: Sequence[CurvePoint]) -> Iterator[str]:
    for point in points:
        yield (
            f'<rect class="hover" x="{plot.x(point.exit - 0.5):.1f}" y="{plot.top}" width="{plot.cell:.1f}" '
            f'height="{plot.bottom - plot.top}"><title>{escape(point.note)}</title></rect>'
        )
