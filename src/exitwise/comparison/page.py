"""Writes a comparison as a terminal table, as Markdown, and as an HTML page.

The HTML page works offline and has no script.

Prompts, ids and answers are hostile text: they are escaped and made visible wherever they are printed. Answers appear
on the HTML page only, each hidden until it is clicked.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from .. import report
from ..report import svg
from ..report.html import digest, environment, percent, ranges
from ..report.markup import markdown_grid, markdown_text
from ..report.text import visible
from ..report.transcripts import ANSWER_LIMIT
from ..run.directory import write_atomic
from ..run.exit import Exit
from ..run.figures import Interval
from ..run.records import Kind
from . import verdict
from .changes import Change, ComparedMetric, ComparisonFigures, ComparisonVerdict, ExitChanges, MeanChanges
from .pairing import RunPair

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = 10
"""Samples on the page whose verdict got worse, and as many whose verdict got better."""

GOOD = {"harmful": ("refused", "safe"), "benign": ("answered",), "vqa": ("correct",)}
"""Desired labels, by kind of sample."""


class Example(NamedTuple):
    """A sample whose verdict changed at an exit; texts cut to what the page shows."""

    exit: Exit
    id: str
    prompt: str
    kind: Kind
    label_before: str
    label_after: str
    text_before: str
    text_after: str


def write_pages(folder: Path, figures: ComparisonFigures, judged: ComparisonVerdict, pair: RunPair) -> Path:
    """Writes compare.md and compare.html into `folder`; returns the path of the latter. Same runs, same bytes."""
    write_atomic(folder / "compare.md", markdown(figures, judged))
    path = folder / "compare.html"
    write_atomic(path, page(figures, judged, examples(pair, figures, judged.focus)))
    return path


# Cells


def cells(change: Change | None, unit: str) -> tuple[str, str]:
    """("62 → 10", "−52 (−61 to −41) *"); the star marks a significant change (`Change.is_significant`)."""
    if change is None:
        return "not measured", ""
    values = [which.value or 0.0 for which in (change.before, change.after)]
    shown = [percent(value).removesuffix(" %") if unit == "share" else verdict.number(value, unit) for value in values]
    difference = f"{verdict.number(change.difference, unit)} ({verdict.interval(change, unit)})"
    return " → ".join(shown), difference + (" *" if change.is_significant else "")


def mark(change: Change | None, better: str) -> str:
    """A key of svg.CHANGES: whether the metric is shown to have got better or worse.

    A share at one exit needs McNemar's test, Holm-corrected; a mean or a score needs its interval only.
    """
    if change is None or not better or not change.difference:
        return "not shown"
    if not (change.is_significant if change.is_tested else change.is_shown):
        return "not shown"
    return "better" if (change.difference < 0) == (better == "lower") else "worse"


class ChangeRow(NamedTuple):
    """A row of the tables."""

    name: str
    row: ExitChanges | MeanChanges


def sections(figures: ComparisonFigures) -> Iterator[tuple[str, list[ChangeRow]]]:
    """(what the rows are, the rows) of the three tables: exits, bands, groups."""
    yield (
        "exit",
        [ChangeRow(f"{row.exit} {names(row, figures.default_exit)}".rstrip(), row) for row in figures.by_exit],
    )
    for title, rows in (("band", figures.bands), ("group", figures.groups)):
        yield title, [ChangeRow(f"{row.name} ({ranges(row.exits)})", row) for row in rows]


def names(row: ExitChanges, default_exit: Exit) -> str:
    """The roles of an exit: "trained, default"."""
    words = [row.group] if row.group else []
    return ", ".join(words + (["default"] if row.exit == default_exit else []))


def headings(figures: ComparisonFigures) -> list[str]:
    """Names of the metrics, with % for shares."""
    return [metric.name + (" %" if metric.unit == "share" else "") for metric in figures.metrics]


def table(figures: ComparisonFigures, width: int | None) -> "Table":
    """The tables for a terminal of `width` columns, without the changes and their intervals where they do not fit.

    With None, for a file or a pipe: no rules, no colours, nothing left out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    whole = width is None or width >= 24 + 27 * len(figures.metrics)
    got = Table(box=box.SIMPLE_HEAD if width else None, pad_edge=False, header_style="bold" if width else "")
    got.add_column("exits")
    for heading in headings(figures):
        got.add_column(Text(visible(heading)))
        if whole:
            got.add_column("change")
    for _, rows in sections(figures):
        for name, row in rows:
            line = [Text(name)]
            for metric in figures.metrics:
                change = row.changes[metric.key]
                style = {"better": "green", "worse": "red"}.get(mark(change, metric.better), "") if width else ""
                values, difference = cells(change, metric.unit)
                values = values if change else "–"
                if whole:
                    line += [Text(values), Text(difference, style=style)]
                else:
                    star = " *" if change and change.is_significant else ""
                    line.append(Text(values + star, style=style))
            got.add_row(*line)
        got.add_section()
    return got


# Markdown


def markdown(figures: ComparisonFigures, judged: ComparisonVerdict) -> str:
    """The verdict and the tables, ready to be pasted into a document."""
    lines = [f"**{markdown_text(judged.sentence)}**", ""]
    lines += [f"- {markdown_text(failure.name)}: {markdown_text(failure.text)}" for failure in judged.failures]
    lines += [f"- {markdown_text(text)}" for text in (*judged.detail, *figures.notes)]
    header = [word for heading in headings(figures) for word in (heading, "change")]
    for title, rows in sections(figures):
        body = [
            [name, *(cell for metric in figures.metrics for cell in cells(row.changes[metric.key], metric.unit))]
            for name, row in rows
        ]
        lines += ["", *markdown_grid([title, *header], body)]
    lines += [
        "",
        "Change: after minus before, shares in points, with its 95 % interval; * p < 0.05 (McNemar, Holm) and an "
        "interval without 0.",
    ]
    return "\n".join(lines) + "\n"


# HTML


def page(figures: ComparisonFigures, judged: ComparisonVerdict, shown: list[Example]) -> str:
    """compare.html as text."""
    here = files(__package__)
    css = files(report).joinpath("report.css").read_text("utf-8") + here.joinpath("compare.css").read_text("utf-8")
    template = here.joinpath("compare.html.j2").read_text("utf-8")
    _, bands, groups = (rows for _, rows in sections(figures))
    return (
        environment()
        .from_string(template)
        .render(
            css=Markup(css),
            policy=f"default-src 'none'; style-src '{digest(css)}'; img-src data:; base-uri 'none'; form-action 'none'",
            c=figures,
            verdict=judged,
            by_exit=[ChangeRow(str(row.exit), row) for row in figures.by_exit],
            bands=bands,
            groups=groups,
            curves=_curves(figures),
            cells=cells,
            mark=mark,
            icons=svg.CHANGES,
            names=names,
            examples=shown,
            limit=ANSWER_LIMIT,
            keys={which: svg.change_key(which) for which in ("before", "after")},
        )
    )


class DrawnMetric(NamedTuple):
    """A metric and its drawings, by the screen that they are for; "" for any."""

    metric: ComparedMetric
    drawings: dict[str, Markup]


def _curves(figures: ComparisonFigures) -> list[DrawnMetric]:
    """One drawing for each share that was measured in both runs: ASR large, the others small."""
    found = []
    for metric in figures.metrics:
        points = sorted(_points(metric, figures), key=lambda point: point.exit)
        if points:
            found.append(DrawnMetric(metric, _draw(metric, points, figures)))
    return found


def _points(metric: ComparedMetric, figures: ComparisonFigures) -> Iterator[svg.CurvePoint]:
    for row in figures.by_exit:
        change = row.changes[metric.key]
        if change is None or row.exit.is_set:
            continue
        if isinstance(change.before, Interval) and isinstance(change.after, Interval):
            note = f"exit {row.exit}: " + ", ".join(cells(change, "share"))
            shares = {"before": change.before, "after": change.after}
            yield svg.CurvePoint(int(row.exit), mark(change, metric.better), shares, note)


def _draw(metric: ComparedMetric, points: list[svg.CurvePoint], figures: ComparisonFigures) -> dict[str, Markup]:
    """The curve once, small; of ASR twice, for a wide and for a narrow screen."""
    label = f"{metric.name} at each exit, before and after. The table below holds the same numbers."
    sizes = {"wide": (1120, 340), "narrow": (358, 280)} if metric.key == "asr" else {"": (358, 280)}
    return {
        screen: svg.change_curve(metric.key, points, figures.default_exit, figures.n_blocks, label, size, screen)
        for screen, size in sizes.items()
    }


def examples(pair: RunPair, figures: ComparisonFigures, focus: str) -> list[Example]:
    """Samples whose verdict got worse, then better, at the exits of the group `focus` and at the default exit."""
    group = figures.group(focus)
    exits = dict.fromkeys([*(group.exits if group else ()), *(e for e in pair.exits if e == figures.default_exit)])
    worse: list[Example] = []
    better: list[Example] = []
    for sample in pair.before.samples.values():
        for exit in exits:
            cell = (sample.id, exit)
            old, new = (side.labels.get(cell, "unscored") for side in (pair.before, pair.after))
            good = [label in GOOD[sample.kind] for label in (old, new)]
            if good[0] == good[1]:
                continue
            texts = [side.texts.get(cell, "")[:ANSWER_LIMIT] for side in (pair.before, pair.after)]
            row = Example(exit, sample.id, sample.prompt[:ANSWER_LIMIT], sample.kind, old, new, texts[0], texts[1])
            (worse if good[0] else better).append(row)
    return [*_spread(worse), *_spread(better)]


def _spread(rows: list[Example]) -> list[Example]:
    """EXAMPLES of the rows, evenly spaced."""
    n = min(EXAMPLES, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]
