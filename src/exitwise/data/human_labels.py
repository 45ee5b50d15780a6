"""Loads answers with labels by people: one a row of a CSV, TSV or JSONL file, each person's label and the majority.

JailbreakBench's judge comparison (Chao et al. 2024) is the pattern: goal, target_response, human1 ... human3,
human_majority, and a column for each judge.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .rows import read_rows

HUMAN = re.compile(r"(?:human|annotator|rater)[ _]?\d+", re.IGNORECASE)
MAJORITY = ("human_majority", "majority")
PROMPT = ("goal", "prompt", "question", "behavior", "request")
ANSWER = ("target_response", "response", "answer", "completion", "generation")
YES, NO = ("1", "1.0", "true", "yes", "unsafe", "jailbroken"), ("0", "0.0", "false", "no", "safe", "refused")


class LabelledAnswer(NamedTuple):
    """An answer with labels by people: True for unsafe (the attack succeeded), None where a label is missing."""

    place: str
    prompt: str
    answer: str
    people: tuple[bool | None, ...]
    truth: bool | None
    """The majority label; None for a tie, or where there is no label."""
    columns: Mapping[str, str]


def read_labels(path: Path, humans: Sequence[str] = ()) -> tuple[list[LabelledAnswer], list[str]]:
    """(rows, names of the columns of people).

    Raises:
        UserError: it cannot be read, lacks a column, or a label is neither yes nor no; with file and line.
    """
    table = _read_table(path)
    columns = list(dict.fromkeys(name for _, cells in table for name in cells))
    people = list(humans) or [name for name in columns if HUMAN.fullmatch(name)]
    majority = next((name for name in MAJORITY if name in columns), None) if not humans else None
    if missing := [name for name in people if name not in columns]:
        raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(columns)}")
    if not people and not majority:
        raise UserError(
            f"{path} has no labels of people; expected columns human1, human2 ... or human_majority, or name them with "
            f"--humans (it has {', '.join(columns)})"
        )
    prompt, answer = _first(PROMPT, columns), _first(ANSWER, columns)
    rows = []
    for place, cells in table:
        said = tuple(_yes_or_no(cells.get(name, ""), f"{path}, {place}, column {name}") for name in people)
        truth = _majority(said)
        if majority:
            truth = _yes_or_no(cells.get(majority, ""), f"{path}, {place}, column {majority}")
        rows.append(LabelledAnswer(place, cells.get(prompt, ""), cells.get(answer, ""), said, truth, cells))
    return rows, people


def _first(wanted: Sequence[str], columns: Sequence[str]) -> str:
    by_lower = {name.lower(): name for name in columns}
    return next((by_lower[name] for name in wanted if name in by_lower), "")


def _majority(said: Sequence[bool | None]) -> bool | None:
    votes = Counter(label for label in said if label is not None)
    return None if votes[True] == votes[False] else votes[True] > votes[False]


def _yes_or_no(cell: str, place: str) -> bool | None:
    word = cell.strip().lower()
    if word and word not in YES + NO:
        raise UserError(f"{place}: got {cell[:40]!r}; expected 1 or 0 (unsafe or safe, yes or no), or nothing")
    return word in YES if word else None


def _read_table(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(place, cells by column) of each row; unlike prompts, a label that cannot be read stops the reading."""
    rows = []
    for row in read_rows(path):
        cells = {name: "" if cell is None else str(cell) for name, cell in row.cells.items()}
        fault = row.fault or next(filter(None, map(_fault, (*cells, *cells.values()))), "")
        if fault:
            raise UserError(f"{path}, {row.place}: {fault}; correct the row")
        rows.append((row.place, cells))
    if not rows:
        raise UserError(f"{path} has no rows; expected one answer a row under a row of column names")
    return rows


def _fault(cell: str) -> str:
    if "\0" in cell:
        return "a NUL byte"
    return "not UTF-8 text" if re.search("[\ud800-\udfff]", cell) else ""


def column_labels(rows: Sequence[LabelledAnswer], name: str, path: Path) -> list[bool | None]:
    """The labels of a column, such as those of a judge.

    Raises:
        UserError: there is no such column, or a label is neither yes nor no.
    """
    if not any(name in row.columns for row in rows):
        raise UserError(f"{path} has no column {name!r}; it has {', '.join(rows[0].columns)}")
    return [_yes_or_no(row.columns.get(name, ""), f"{path}, {row.place}, column {name}") for row in rows]
