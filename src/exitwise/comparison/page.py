"""A comparison as a table in the terminal, as Markdown, and as one offline HTML page without a script.

Prompts, ids and answers are hostile text: escaped and made visible wherever they are printed. Answers appear on the
HTML page only, each behind a click.
"""

import html
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from .. import report
from ..report import svg
from ..report.html import digest, environment, p_value, percent, ranges
from ..report.text import visible
from ..report.transcripts import ANSWER_LIMIT
from ..run.directory import write_atomic
from . import verdict
from .pairing import Pair

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = 10
"""Samples on the page whose verdict got worse, and as many whose verdict got better."""

GOOD = {"harmful": ("refused", "safe"), "benign": ("answered",), "vqa": ("correct",)}
"""Labels that one hopes for, by kind of sample."""


class Example(NamedTuple):
    """A sample whose verdict changed at an exit; texts cut to what the page shows."""

    exit: int
    id: str
    prompt: str
    kind: str
    label_before: str
    label_after: str
    text_before: str
    text_after: str


def write_pages(folder: Path, figures: Mapping[str, Any], pair: Pair) -> Path:
    """Writes compare.md and compare.html into `folder`; returns the path of the latter. Same runs, same bytes."""
    write_atomic(folder / "compare.md", markdown(figures))
    path = folder / "compare.html"
    write_atomic(path, page(figures, examples(pair, figures)))
    return path


# Cells


def cells(entry: Mapping[str, Any] | None, unit: str) -> tuple[str, str]:
    """("62 → 10", "−52 (−61 to −41) *"); the star: see `verdict.telling`."""
    if entry is None:
        return "not measured", ""
    values = [entry[which]["value"] for which in ("before", "after")]
    shown = [percent(value).removesuffix(" %") if unit == "share" else verdict.number(value, unit) for value in values]
    difference = f"{verdict.number(entry['difference'], unit)} ({verdict.interval(entry, unit)})"
    return " → ".join(shown), difference + (" *" if verdict.telling(entry) else "")


def mark(entry: Mapping[str, Any] | None, better: str) -> str:
    """A key of svg.CHANGES: whether the metric is shown to have got better or worse. At an exit that takes McNemar's
    test, Holm-corrected; for a mean and for a score it takes the interval."""
    if entry is None or not better or not entry["difference"]:
        return "not shown"
    if not (verdict.telling(entry) if "p_holm" in entry else verdict.shown(entry)):
        return "not shown"
    return "better" if (entry["difference"] < 0) == (better == "lower") else "worse"


def sections(figures: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """(what the rows are, [(name, row)]) for the tables: exits, bands, groups."""
    notes = {row["exit"]: names(row, figures["default_exit"]) for row in figures["by_exit"]}
    yield "exit", [(f"{row['exit']} {notes[row['exit']]}".rstrip(), row) for row in figures["by_exit"]]
    for title, key in (("band", "bands"), ("group", "groups")):
        yield title, [(f"{row[title]} ({ranges(row['exits'])})", row) for row in figures[key]]


def names(row: Mapping[str, Any], default_exit: int) -> str:
    """What an exit is called beside its number: "trained, default"."""
    words = [row["group"]] if row["group"] else []
    return ", ".join(words + (["default"] if row["exit"] == default_exit else []))


def table(figures: Mapping[str, Any], width: int | None) -> "Table":
    """The tables for a terminal of `width` columns, without the changes and their intervals where they would not fit.

    With None, for a file or a pipe: no rules, no colours, nothing left out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metrics = figures["metrics"]
    whole = width is None or width >= 24 + 27 * len(metrics)
    got = Table(box=box.SIMPLE_HEAD if width else None, pad_edge=False, header_style="bold" if width else "")
    got.add_column("exits")
    for metric in metrics:
        got.add_column(Text(visible(metric["name"]) + (" %" if metric["unit"] == "share" else "")))
        if whole:
            got.add_column("change")
    for _, rows in sections(figures):
        for name, row in rows:
            line = [Text(name)]
            for metric in metrics:
                entry = row[metric["key"]]
                style = {"better": "green", "worse": "red"}.get(mark(entry, metric["better"]), "") if width else ""
                values, moved = cells(entry, metric["unit"])
                values = values if entry else "–"
                if whole:
                    line += [Text(values), Text(moved, style=style)]
                else:
                    line.append(Text(values + (" *" if entry and verdict.telling(entry) else ""), style=style))
            got.add_row(*line)
        got.add_section()
    return got


# Markdown


def markdown(figures: Mapping[str, Any]) -> str:
    """The verdict and the tables, ready to be pasted into a document."""
    judged = figures["verdict"]
    lines = [f"**{_md(judged['sentence'])}**", ""]
    lines += [f"- {_md(failure['name'])}: {_md(failure['text'])}" for failure in judged["failures"]]
    lines += [f"- {_md(text)}" for text in (*judged["detail"], *figures["notes"])]
    names = [metric["name"] + (" %" if metric["unit"] == "share" else "") for metric in figures["metrics"]]
    heads = [word for name in names for word in (_md(name), "change")]
    for title, rows in sections(figures):
        lines += ["", f"| {title} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for name, row in rows:
            found = [cell for metric in figures["metrics"] for cell in cells(row[metric["key"]], metric["unit"])]
            lines.append(f"| {_md(name)} | " + " | ".join(map(_md, found)) + " |")
    lines += [
        "",
        "Change: after minus before, shares in points, with its 95 % interval; * p < 0.05 (McNemar, Holm) and an "
        "interval without 0.",
    ]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Text in which Markdown and HTML mean nothing, on one line."""
    text = html.escape(visible(text), quote=False).replace("\n", " ")
    return "".join(f"\\{char}" if char in "\\`*_[]|~#" else char for char in text)


# HTML


def page(figures: Mapping[str, Any], shown: list[Example]) -> str:
    """compare.html as text."""
    here = files(__package__)
    css = files(report).joinpath("report.css").read_text("utf-8") + here.joinpath("compare.css").read_text("utf-8")
    template = here.joinpath("compare.html.j2").read_text("utf-8")
    env = environment()
    env.filters.update(visible=visible, p_value=p_value)
    return env.from_string(template).render(
        css=Markup(css),
        policy=f"default-src 'none'; style-src '{digest(css)}'; img-src data:; base-uri 'none'; form-action 'none'",
        c=figures,
        curves=_curves(figures),
        cells=cells,
        mark=mark,
        icons=svg.CHANGES,
        names=names,
        examples=shown,
        limit=ANSWER_LIMIT,
        keys={which: svg.change_key(which) for which in ("before", "after")},
    )


def _curves(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One picture a share that was measured in both runs: ASR large, the others small."""
    found = []
    for metric in figures["metrics"]:
        rows = [
            {
                "exit": row["exit"],
                **{which: entry[which] for which in ("before", "after")},
                "mark": mark(entry, metric["better"]),
                "note": f"exit {row['exit']}: " + ", ".join(cells(entry, "share")),
            }
            for row in figures["by_exit"]
            if (entry := row[metric["key"]]) and metric["unit"] == "share"
        ]
        if rows:
            found.append({**metric, **_drawn(metric, rows, figures)})
    return found


def _drawn(metric: Mapping[str, Any], rows: list[dict[str, Any]], figures: Mapping[str, Any]) -> dict[str, Markup]:
    """The curve once, small; of ASR twice, for a wide and for a narrow screen."""
    label = f"{metric['name']} at each exit, before and after. The table below holds the same numbers."
    sizes = {"wide": (1120, 340), "narrow": (358, 280)} if metric["key"] == "asr" else {"": (358, 280)}
    depth = figures["default_exit"], figures["n_blocks"]
    return {
        screen or "svg": svg.change_curve(metric["key"], rows, *depth, label, size, screen)
        for screen, size in sizes.items()
    }


def examples(pair: Pair, figures: Mapping[str, Any]) -> list[Example]:
    """Samples whose verdict got worse, then better, at the exits that the verdict is about and at the default one."""
    focus = next(row for row in figures["groups"] if row["group"] == figures["verdict"]["focus"])
    exits = dict.fromkeys([*focus["exits"], *(e for e in pair.exits if e == figures["default_exit"])])
    worse: list[Example] = []
    better: list[Example] = []
    for sample in pair.before.samples.values():
        for exit in exits:
            cell = (sample.id, exit)
            old, new = (run.labels.get(cell, "unscored") for run in (pair.before, pair.after))
            good = [label in GOOD[sample.kind] for label in (old, new)]
            if good[0] == good[1]:
                continue
            texts = [run.texts.get(cell, "")[:ANSWER_LIMIT] for run in (pair.before, pair.after)]
            row = Example(exit, sample.id, sample.prompt[:ANSWER_LIMIT], sample.kind, old, new, texts[0], texts[1])
            (worse if good[0] else better).append(row)
    return [*_spread(worse), *_spread(better)]


def _spread(rows: list[Example]) -> list[Example]:
    """EXAMPLES of the rows, evenly spaced."""
    n = min(EXAMPLES, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]
