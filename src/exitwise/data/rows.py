"""Reads rows of CSV, TSV, JSONL, JSON, TXT (each also .gz) and Parquet files; a bad row carries its fault."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError, missing_package

if TYPE_CHECKING:
    from pyarrow import RecordBatch

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")
MAX_BYTES = 256 * 2**20
"""Limit of the size of an unpacked file: a gzip file of a few kilobytes can hold gigabytes."""


class FileRow(NamedTuple):
    """One row of a file."""

    place: str
    """`line N`; `item N` of a .json list and `row N` of a Parquet file, which have no lines."""
    cells: Mapping[str, object]
    """By column: text in CSV, TSV and TXT, any JSON or Parquet value elsewhere."""
    fault: str = ""
    """Why the row cannot be read; "" if it can."""


def read_rows(path: Path) -> Iterator[FileRow]:
    """All rows of a file, the unreadable ones with their fault.

    Raises:
        UserError: the file cannot be read, is not what its extension says, or is too large.
    """
    form = _form(path)
    if form == ".parquet":
        return _parquet_rows(path)
    raw = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    _require_text(path, raw)
    if form in (".csv", ".tsv"):
        return _table_rows(path, decode(raw), "," if form == ".csv" else "\t")
    if form == ".txt":
        return (FileRow(f"line {n}", {"prompt": text}) for n, text in _lines(raw))
    if form == ".json" and raw.lstrip().startswith(b"["):
        return _list_rows(path, decode(raw))
    return (_json_row(f"line {n}", text) for n, text in _lines(raw))


def read_json(path: Path, most: int | None = None) -> object:
    """The value of a .json file (also .gz); bytes that are not UTF-8 stay visible in its strings as half pairs.

    Raises:
        UserError: the file cannot be read, is larger than `most` bytes, or is not JSON.
    """
    try:
        return json.loads(decode(read_bytes(path, most).removeprefix(b"\xef\xbb\xbf")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{show(path)} is not valid JSON ({error}); correct it, or fetch it again") from None


def object_row(place: str, value: object) -> FileRow:
    """A row of one JSON value."""
    return FileRow(place, value) if isinstance(value, dict) else FileRow(place, {}, "not a JSON object")


def stem(name: str) -> str:
    """The file name without .gz and the extension below it."""
    return Path(re.sub(r"(?i)\.gz$", "", name)).stem


def show(path: Path) -> str:
    """The path on one line, whatever its name."""
    return repr(str(path))


def _form(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    form = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if form not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise UserError(f"{show(path)} has an unknown extension; expected {known}, all but Parquet also with .gz")
    return form


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The whole file, unpacked where it ends in .gz; UserError where it cannot be read or is larger than `most`."""
    most = MAX_BYTES if most is None else most
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as handle:
            raw = handle.read(most + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read {show(path)} ({reason}); give a file that exists") from None
    if len(raw) > most:
        raise UserError(f"{show(path)} holds more than {most // 2**20} MiB; split it into smaller files")
    return raw


def _require_text(path: Path, raw: bytes) -> None:
    """Refuses files that are not text at all; single bad rows are left to `_fault`."""
    head = raw[:65536].decode("utf-8", "replace")
    strange = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f\v") for c in head)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b") or (len(head) >= 32 and strange > 0.3 * len(head)):
        raise UserError(f"{show(path)} is not UTF-8 text; save it as UTF-8, or give it the extension it needs")


def decode(raw: bytes) -> str:
    """Text; bytes that are not UTF-8 become half pairs, which a later check of each cell finds."""
    return raw.decode("utf-8", "surrogateescape")


def _lines(raw: bytes) -> Iterator[tuple[int, str]]:
    # bytes.splitlines ends lines at CR and LF only; str.splitlines would also cut prompts at U+2028 and form feeds.
    return ((n, decode(line)) for n, line in enumerate(raw.splitlines(), start=1) if line.strip())


def _json_row(place: str, text: str) -> FileRow:
    try:
        value = json.loads(text)
    except RecursionError:
        return FileRow(place, {}, "the JSON is nested too deeply")
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        return FileRow(place, {}, f"not JSON ({getattr(error, 'msg', 'a number too large')})")
    return object_row(place, value)


def _list_rows(path: Path, text: str) -> Iterator[FileRow]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{show(path)} is not valid JSON ({error}); expected a list of objects; correct it") from None
    return (object_row(f"item {n}", item) for n, item in enumerate(items, start=1))


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[FileRow]:
    """Rows of a table whose first row names the columns; of two columns of one name the first counts."""
    rows = _records(text, delimiter)
    _, header, fault = next(rows, (1, [], ""))
    if fault:
        raise UserError(f"{show(path)} has no readable row of column names ({fault}); correct it")
    index: dict[str, int] = {}
    for i, name in enumerate(header):
        index.setdefault(name.strip(), i)
    for line, cells, fault in rows:
        if not fault and (len(cells) < len(header) or any(cells[len(header) :])):  # spreadsheets pad with empty cells
            fault = f"{len(cells)} cells under {len(header)} columns; quote cells that hold a delimiter"
        yield FileRow(f"line {line}", {} if fault else {name: cells[i] for name, i in index.items()}, fault)


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """(first line, cells, fault) of each record; blank lines are none.

    Strict, because the lenient reader lets a quote that is never closed swallow the rest of the file unseen.
    """
    previous = csv.field_size_limit(len(text) + 1)  # or one huge cell ends the reading
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                until = f" (lines {line} to {reader.line_num} are lost)" if reader.line_num > line else ""
                yield line, [], f"a quote is open or misplaced{until}"
                continue
            if cells:
                yield line, cells, ""
    finally:
        csv.field_size_limit(previous)


def _parquet_rows(path: Path) -> Iterator[FileRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package(f"the Parquet file {show(path)}", "pyarrow", "parquet") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for i in range(batch.num_rows):
                    number += 1
                    yield _arrow_row(f"row {number}", batch, i)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        after = f" after row {number}" if number else ""
        raise UserError(f"cannot read {show(path)}{after} ({reason}); fetch the Parquet file again") from None


def _arrow_row(place: str, batch: "RecordBatch", i: int) -> FileRow:
    cells: dict[str, object] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            cells.setdefault(name, column[i].as_py())
        except UnicodeDecodeError:
            return FileRow(place, {}, f"the column {name[:40]!r} is not valid UTF-8")
    return FileRow(place, cells)
