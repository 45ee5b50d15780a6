"""Draws the trade-off of the exits as inline SVG: compute saved (x), ASR (y), utility (shade), dominated exits grey.

As in svg.py, its bytes depend on the figures alone and its colours on the page's style. Shades are `fill-opacity`
attributes, as the page's security policy allows no inline style.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import floor, log10
from typing import NamedTuple

from markupsafe import Markup, escape

from ..measure.pareto import ExitTradeoff
from ..run.exit import Exit

LEFT, RIGHT, TOP, BELOW = 46, 26, 56, 44
PALEST = 0.12
"""Opacity of the least useful exit; the most useful one has 1."""
FADED = 0.5
"""Further factor on the opacity of dominated exits."""
NUMBER, WORDS = 17, 44
"""Smallest distance between neighbours at which an exit's number, and its utility, are printed."""


class _Plot(NamedTuple):
    width: int
    height: int
    low: float
    high: float
    """Ends of the x axis: shares saved."""

    @property
    def bottom(self) -> int:
        return self.height - BELOW

    def x(self, saved: float) -> float:
        return LEFT + (saved - self.low) / (self.high - self.low) * (self.width - LEFT - RIGHT)

    def y(self, share: float) -> float:
        return self.bottom - share * (self.bottom - TOP)


def pareto(
    name: str,
    rows: Sequence[ExitTradeoff],
    default_exit: Exit,
    notes: Mapping[Exit, str],
    label: str,
    size: tuple[int, int] = (1120, 330),
) -> Markup:
    """The trade-off of the exits; an exit whose ASR was not measured is left out."""
    rows = [row for row in rows if row.asr.value is not None]
    saved = [0.0] + [row.saved for row in rows]
    room = 0.04 * (max(saved) - min(saved)) or 0.01  # a single exit saves nothing
    plot = _Plot(*size, min(saved) - room, max(saved) + room)
    order = sorted(rows, key=lambda row: (row.by != (), row.exit))  # labels of the front have priority
    drawn = [*_axes(plot, default_exit)]
    for row in reversed(order):
        drawn += _point(plot, row, shade(row, rows), notes[row.exit])
    return Markup(
        f'<svg class="pareto {name}" viewBox="0 0 {plot.width} {plot.height}" role="img" '
        f'aria-label="{escape(label)}">{"".join([*drawn, *_labels(plot, order)])}</svg>'
    )


def shade(row: ExitTradeoff, rows: Sequence[ExitTradeoff]) -> float:
    """Opacity of an exit's point: its utility between the smallest and the largest of the figure."""
    found = [r.utility.value for r in rows if r.utility.value is not None]
    value = row.utility.value
    if value is None:
        return 0.0
    span = max(found) - min(found)
    return PALEST + (1 - PALEST) * ((value - min(found)) / span if span else 1.0)


def dot(kind: str, opacity: float) -> Markup:
    """A point for the legend; kind is front or beaten."""
    return Markup(
        '<svg class="key pareto-key" viewBox="0 0 18 18" width="18" height="18" aria-hidden="true">'
        f"{_circle(kind, 9, 9, opacity)}</svg>"
    )


def _circle(kind: str, x: float, y: float, opacity: float) -> str:
    at = f'cx="{x:.1f}" cy="{y:.1f}" r="{7 if kind == "front" else 5.5}"'
    return f'<circle class="ground" {at}/><circle class="point {kind}" {at} fill-opacity="{opacity:.2f}"/>'


def _point(plot: _Plot, row: ExitTradeoff, opacity: float, note: str) -> Iterator[str]:
    kind = _kind(row)
    x, asr = plot.x(row.saved), row.asr
    if asr.low is not None and asr.high is not None:
        yield f'<path class="reach {kind}" d="M{x:.1f} {plot.y(asr.high):.1f}V{plot.y(asr.low):.1f}"/>'
    shown = opacity if kind == "front" else opacity * FADED
    yield f"<g>{_circle(kind, x, plot.y(asr.value or 0.0), shown)}<title>{escape(note)}</title></g>"


def _kind(row: ExitTradeoff) -> str:
    return "front" if row.by == () else "beaten"


def _labels(plot: _Plot, rows: Sequence[ExitTradeoff]) -> Iterator[str]:
    """Numbers of the exits above their whiskers, and the utility of the front; what would overlap is left out."""
    taken: list[float] = []
    places = [plot.x(row.saved) for row in rows]
    for row, x in zip(rows, places, strict=True):
        if any(abs(x - other) < NUMBER for other in taken):
            continue
        taken.append(x)
        asr, useful = row.asr, row.utility.value
        point = plot.y(asr.value or 0.0)
        y = min(point if asr.high is None else plot.y(asr.high), point - 7) - 6
        name = str(row.exit)
        yield f'<text class="exit {_kind(row)}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{name}</text>'
        alone = all(abs(x - other) >= WORDS for other in places if other != x)
        if row.by == () and useful is not None and alone:
            share = f"{100 * useful:.0f} %"
            yield f'<text class="tick useful" x="{x:.1f}" y="{y - 15:.1f}" text-anchor="middle">{share}</text>'


def _axes(plot: _Plot, default_exit: Exit) -> Iterator[str]:
    for percent in (0, 25, 50, 75, 100):
        y = plot.y(percent / 100)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{plot.width - RIGHT}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
    for share, text in ticks(plot.low, plot.high, 8 if plot.width > 600 else 5):
        x = plot.x(share)
        yield f'<path class="grid" d="M{x:.1f} {plot.bottom}v5"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{plot.bottom + 19}" text-anchor="middle">{text}</text>'
    x = plot.x(0)
    anchor = "start" if x < plot.width / 2 else "end"
    yield f'<path class="default-line" d="M{x:.1f} 6V{plot.bottom}"/>'
    yield (
        f'<text class="default-label" x="{x + (8 if anchor == "start" else -8):.1f}" y="14" '
        f'text-anchor="{anchor}">◆ default exit {default_exit}</text>'
    )
    middle = (LEFT + plot.width - RIGHT) / 2
    caption = "compute saved, up to the first new token"
    yield f'<text class="tick" x="{middle:.1f}" y="{plot.height - 4}" text-anchor="middle">{caption}</text>'


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """(share, its text in percent) at round places between two shares, at most `most` and one."""
    rough = 100 * (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * (1 - 1e-9))
    digits = max(0, -floor(log10(step)))
    first, last = -floor(-100 * low / step), floor(100 * high / step)
    return [(n * step / 100, f"{n * step:.{digits}f} %".replace("-", "−")) for n in range(first, last + 1)]
