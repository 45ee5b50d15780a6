"""Answers that people labelled: one a row of a CSV or JSONL file, with what each person said and what most say.

JailbreakBench's judge comparison (Chao et al. 2024) is the pattern: goal, target_response, human1 ... human3,
human_majority, and a column for each judge.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

HUMAN = re.compile(r"(?:human|annotator|rater)[ _]?\d+", re.IGNORECASE)
MAJORITY = ("human_majority", "majority")
PROMPT = ("goal", "prompt", "question", "behavior", "request")
ANSWER = ("target_response", "response", "answer", "completion", "generation")
YES, NO = ("1", "1.0", "true", "yes", "unsafe", "jailbroken"), ("0", "0.0", "false", "no", "safe", "refused")


class Row(NamedTuple):
    """An answer that people labelled: True for unsafe (the attack worked), None where somebody said nothing."""

    place: str
    prompt: str
    answer: str
    people: tuple[bool | None, ...]
    truth: bool | None
    """What most people say; None for a tie, or where nobody said anything."""
    columns: Mapping[str, str]


def read_labels(path: Path, humans: Sequence[str] = ()) -> tuple[list[Row], list[str]]:
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
        rows.append(Row(place, cells.get(prompt, ""), cells.get(answer, ""), said, truth, cells))
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
    """(place, cells by column) of each row; a file of no rows is refused."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a CSV or JSONL file of labels") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a NUL byte; take it out")
    rows = _json_lines(path, text) if path.suffix in (".jsonl", ".json") else _csv_rows(path, text)
    if not rows:
        raise UserError(f"{path} has no rows; expected one answer a row under a row of column names")
    return rows


def _json_lines(path: Path, text: str) -> list[tuple[str, dict[str, str]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; expected one answer a line")
        rows.append((f"line {number}", {key: "" if cell is None else str(cell) for key, cell in value.items()}))
    return rows


def _csv_rows(path: Path, text: str) -> list[tuple[str, dict[str, str]]]:
    previous = csv.field_size_limit(len(text) + 1)  # one long answer is no error
    reader, rows = csv.reader(io.StringIO(text, newline=""), strict=True), []
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns; correct the row")
            if cells:
                rows.append((f"line {line}", dict(zip(header, cells, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; correct the quotes") from None
    finally:
        csv.field_size_limit(previous)
    return rows


def column_labels(rows: Sequence[Row], name: str, path: Path) -> list[bool | None]:
    """The labels of a column, such as those of a judge.

    Raises:
        UserError: there is no such column, or a label is neither yes nor no.
    """
    if not any(name in row.columns for row in rows):
        raise UserError(f"{path} has no column {name!r}; it has {', '.join(rows[0].columns)}")
    return [_yes_or_no(row.columns.get(name, ""), f"{path}, {row.place}, column {name}") for row in rows]
