"""Writes tables as Markdown, LaTeX or CSV and escapes their cells, so that no cell can add markup, a link or a formula.

Invisible and control characters are made visible (text.py). In LaTeX, characters beyond Latin and a few symbols are
written as their code point, so that pdflatex needs no packages and reports no missing glyph.
"""

import csv
import io
import re
from collections.abc import Callable
from typing import NamedTuple

from .text import visible

LATEX = {
    **{char: f"\\{char}" for char in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "{''}",
    "[": "{[}",  # at the start of a row it would be an option of the line break before it
    "]": "{]}",
    "*": "{*}",
    "`": r"\textasciigrave{}",  # ?` and !` are ligatures
    "-": "{-}",  # -- is one, too
    "→": r"$\rightarrow$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "…": r"\ldots{}",
    "⟨": r"$\langle$",
    "⟩": r"$\rangle$",
    "–": "--",
    "—": "---",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|&~$^]|^#|:(?=//))")
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?: \((?:[+-]?\d+(?:\.\d+)? to [+-]?\d+(?:\.\d+)?|no interval)\))?")
"""A number, with or without its interval."""


class Table(NamedTuple):
    """Cells as plain text; `note` is a sentence below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown with title and note."""
    grid = markdown_grid(table.header, table.rows)
    return "\n".join([f"**{markdown_text(table.title)}**", "", *grid, "", markdown_text(table.note), ""])


def markdown_grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table of GitHub's Markdown."""
    lines = ["| " + " | ".join(map(markdown_text, cells)) + " |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def markdown_text(text: str) -> str:
    """Text on one line in which Markdown and HTML mean nothing: no image, tag, formula or link can result."""
    text = MARKDOWN.sub(r"\\\1", _line(text))
    return re.sub(r"(www)\.", r"\1\\.", text, flags=re.IGNORECASE)  # a bare www. becomes a link


def latex(table: Table) -> str:
    """A tabular of plain LaTeX, no packages, in a table with caption and note."""
    prose = any(len(cell) > 40 for row in table.rows for cell in row[-1:])
    last = "p{0.5\\linewidth}" if prose else "l"
    columns = "l" * (len(table.header) - 1) + last
    lines = [r"\begin{table}", rf"\caption{{{_tex(table.title)}}}", rf"\begin{{tabular}}{{{columns}}}", r"\hline"]
    lines += [_tex_row(table.header), r"\hline", *map(_tex_row, table.rows), r"\hline", r"\end{tabular}"]
    return "\n".join([*lines, "", _tex(table.note), r"\end{table}", ""])


def _tex_row(cells: list[str]) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"


def _tex(text: str) -> str:
    return "".join(map(_tex_char, _line(text)))


def _tex_char(char: str) -> str:
    if char in LATEX:
        return LATEX[char]
    plain = " " <= char <= "~" or ("\u00c0" <= char <= "\u017e" and char.isalpha())
    return char if plain else rf"\texttt{{U+{ord(char):04X}}}"


def csv_text(table: Table) -> str:
    """Comma-separated, quoted where needed; a cell that a spreadsheet would run as a formula begins with '."""
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerows([[_cell(c) for c in row] for row in [table.header, *table.rows]])
    return handle.getvalue()


def _cell(text: str) -> str:
    text = visible(text)
    return "'" + text if text.lstrip()[:1] in ("=", "+", "-", "@") and not NUMBER.fullmatch(text) else text


def _line(text: str) -> str:
    return " ".join(visible(text).split())


RENDERERS: dict[str, Callable[[Table], str]] = {"md": markdown, "latex": latex, "csv": csv_text}
