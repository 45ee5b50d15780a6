"""Loads prompts from files and the built-in sets; every row becomes a sample or a line in `skipped`."""

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..run.records import Kind, Sample
from .images import find_image, keep_image
from .rows import FileRow, read_rows, show, stem

FIELDS = ("prompt", "category", "id", "image", "answers")
"""Names that --map can give a column."""
PROMPT_COLUMNS = ("prompt", "question", "goal", "Goal", "jailbreak_query", "instruction", "text", "redteam_query")
CATEGORY_COLUMNS = ("policy", "category", "Category", "type")
SAME_POLICY = {"Child Abuse Content": "Child Abuse"}
"""JailBreakV-28K's name of a policy, to RedTeam-2K's: figures by policy add up over both."""
MAX_PROMPT = 20_000
"""Characters."""
MAX_LABEL = 200
"""Characters of an id, a category or an answer."""
BUILTIN = Path(__file__).parent / "builtin"
Adapt = Callable[[dict[str, object]], dict[str, object] | str | None]
"""Maps cells to cells named as in FIELDS, to the reason to skip the row, or to None: the row is of another split."""


class Loaded(NamedTuple):
    """What a file holds."""

    samples: list[Sample]
    skipped: list[str]
    """`FILE, line N: reason` (`item N` in a .json list, `row N` in a Parquet file)."""


class Place(NamedTuple):
    """Folder of the images that a table refers to."""

    scheme: str
    """Prefix of their names in `Sample.image`."""
    folder: Path


def builtin_harmful(split: str = "test") -> list[Sample]:
    """Requests a safe model refuses, without an image: 128 "train" and 96 "test"."""
    return _builtin("harmful", split)


def builtin_benign(split: str = "test") -> list[Sample]:
    """Harmless requests that look like harmful ones, without an image: 112 "train" and 80 "test"."""
    return _builtin("benign", split)


def builtin_refusals() -> list[str]:
    """Forty ways to decline, one sentence each, written by us; nothing in them depends on the request."""
    return (BUILTIN / "refusals.txt").read_text(encoding="utf-8").splitlines()


def load_prompts(
    path: Path,
    kind: Kind = "harmful",
    columns: Mapping[str, str] | None = None,
    place: Place | None = None,
) -> Loaded:
    """As `load_table`, for a file that must hold at least one usable row.

    Raises:
        UserError: as `load_table`, or no row is usable.
    """
    loaded = load_table(path, kind, columns, place=place)
    if not loaded.samples:
        reason = "; ".join(loaded.skipped[:1]) or "it is empty"
        raise UserError(f"{show(Path(path))} has no usable row ({reason}); give it prompts")
    return loaded


def load_table(
    path: Path,
    kind: Kind = "harmful",
    columns: Mapping[str, str] | None = None,
    *,
    prefix: str | None = None,
    adapt: Adapt | None = None,
    place: Place | None = None,
) -> Loaded:
    """Samples of a .csv, .tsv, .jsonl, .ndjson, .json (list), .txt (one prompt a line; all also .gz) or .parquet file.

    Args:
        columns: column of each of FIELDS, as in {"prompt": "query", "image": "file"}. Without it the prompt is in the
            first of PROMPT_COLUMNS that the file has, the category in the first of CATEGORY_COLUMNS, the id in "id".
            Images and answers are read only where a column is named. An image cell is a path in the folder of `place`,
            or the image itself (Parquet). Answers are a list, a list of {"answer": ...}, or a text cut at "|".
        prefix: ids are `<prefix>:<id or row N>`; without it, the stem of the file, so that two files do not collide.
        adapt: changes the cells of a row, once they have the names of FIELDS.
        place: where its images are; without it, beside the file, under the scheme "own".

    Text is kept as it is, spaces included.

    Raises:
        UserError: the file cannot be read, is not what its extension says, is empty, or lacks a column.
    """
    path = Path(path)
    rows = list(read_rows(path))
    chosen = _choose_columns(path, rows, columns or {}, adapt is None)
    name = path.name.encode("utf-8", "backslashreplace").decode()
    place = place or Place("own", path.parent)
    return collect(_rename(rows, chosen), name, kind, prefix or stem(name), adapt, place)


def collect(
    rows: Iterable[FileRow],
    name: str,
    kind: Kind,
    prefix: str,
    adapt: Adapt | None = None,
    place: Place | None = None,
) -> Loaded:
    """Samples of rows whose cells have the names of FIELDS; `name` is the file's, for `skipped` and `source`."""
    samples: list[Sample] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        cells = row.fault or (adapt(dict(row.cells)) if adapt else row.cells)
        if cells is None:
            continue
        sample = cells if isinstance(cells, str) else _sample(cells, row.place, number, name, kind, prefix, place)
        if isinstance(sample, Sample) and sample.id in seen:
            sample = "the id is there already"
        if isinstance(sample, str):
            skipped.append(f"{name}, {row.place}: {sample}")
            continue
        seen.add(sample.id)
        samples.append(sample)
    return Loaded(samples, skipped)


def attach_images(samples: Sequence[Sample], image_names: Sequence[str]) -> list[Sample]:
    """Sample i gets image i mod n."""
    _require_images(image_names)
    return [replace(sample, image=image_names[i % len(image_names)]) for i, sample in enumerate(samples)]


def pair_images(samples: Sequence[Sample], image_names: Sequence[str], seed: int) -> list[Sample]:
    """One image a sample, in an order drawn from the seed; each image is used floor(m/n) or ceil(m/n) times."""
    _require_images(image_names)
    return attach_images(samples, random.Random(seed).sample(sorted(image_names), len(image_names)))


def cross(samples: Sequence[Sample], image_names: Sequence[str]) -> list[Sample]:
    """Every prompt with every image, the images of a prompt together; ids are `<id>@<image>`."""
    _require_images(image_names)
    return [replace(s, id=f"{s.id}@{image}", image=image) for s in samples for image in image_names]


def _require_images(image_names: Sequence[str]) -> None:
    if not image_names:
        raise UserError("no images were given; expected at least one image name, such as photo:coffee")


def _builtin(kind: Kind, split: str) -> list[Sample]:
    lines = (BUILTIN / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(number, json.loads(line)) for number, line in enumerate(lines, start=1)]
    if split not in (splits := sorted({row["split"] for _, row in rows})):
        raise UserError(f"split is {split!r}; expected one of {', '.join(splits)}")
    return [
        Sample(row["id"], row["prompt"], kind, "", row["policy"], source=f"{kind}.jsonl:{number}")
        for number, row in rows
        if row["split"] == split
    ]


def _sample(
    cells: Mapping[str, object], where: str, number: int, name: str, kind: Kind, prefix: str, place: Place | None
) -> Sample | str:
    """The sample of a row, or the reason why there is none."""
    prompt = cells.get("prompt")
    key = label_of(cells.get("id")) or f"row{number}"
    category = label_of(cells.get("category"))
    category = SAME_POLICY.get(category, category)
    fault = (
        fault_of(prompt, "prompt", MAX_PROMPT)
        or fault_of(key, "id", MAX_LABEL)
        or (category and fault_of(category, "category", MAX_LABEL))
    )
    if fault:
        return fault
    try:
        image = _image(cells["image"], place) if "image" in cells and place else ""
        answers = _answers(cells["answers"]) if "answers" in cells else ()
    except ValueError as error:
        return str(error)
    if kind == "vqa" and not answers:
        return "the answers are missing"
    source = f"{name}:{where.split()[-1]}"
    return Sample(f"{prefix}:{key}", str(prompt), kind, image, category, answers, source)


def _image(cell: object, place: Place) -> str:
    """The name of the image of a cell; raises ValueError with the reason where there is none."""
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes) and cell["bytes"]:
        return keep_image(cell["bytes"])
    path = cell.get("path") if isinstance(cell, dict) else cell
    fault = fault_of(path, "image path", 1000)
    if fault:
        raise ValueError(fault)
    found = find_image(place.folder, str(path).strip())
    if found is None:
        raise ValueError(f"the image is missing ({path})")
    return f"{place.scheme}:{found}"


def _answers(cell: object) -> tuple[str, ...]:
    """Accepted answers, in their order; raises ValueError with the reason where they are none."""
    items = cell.split("|") if isinstance(cell, str) else cell if isinstance(cell, list | tuple) else [cell]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in items]
    for text in texts:
        fault = fault_of(text, "answer", MAX_LABEL)
        if fault:
            raise ValueError(fault)
    return tuple(str(text) for text in texts)


def label_of(value: object) -> str:
    """Text or a whole number as text; "" for what is neither."""
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def fault_of(value: object, what: str, longest: int) -> str:
    """What is wrong with a text, "" if nothing is."""
    if value is None:
        return f"the {what} is missing"
    if not isinstance(value, str):
        return f"the {what} is not text"
    if not value.strip():
        return f"the {what} is empty"
    if len(value) > longest:
        return f"the {what} has {len(value)} characters, more than {longest}"
    if "\0" in value:
        return f"the {what} has a NUL byte"
    if re.search("[\ud800-\udfff]", value):  # bytes that did not decode, or half a pair escaped in JSON
        return f"the {what} is not valid UTF-8"
    return ""


def _choose_columns(path: Path, rows: list[FileRow], columns: Mapping[str, str], need_prompt: bool) -> dict[str, str]:
    """{field: column of this file}; raises UserError where a named column, or any for the prompt, is missing."""
    strange = sorted(columns.keys() - set(FIELDS))
    if strange:
        raise UserError(f"columns are mapped to {', '.join(strange)}; expected {', '.join(FIELDS)}")
    found = dict.fromkeys(key for row in rows for key in row.cells)
    usual = {"prompt": PROMPT_COLUMNS, "category": CATEGORY_COLUMNS, "id": ("id",)}
    chosen = {}
    for field in FIELDS:
        wanted = (columns[field],) if field in columns else usual.get(field, ())
        column = next((name for name in wanted if name in found), None)
        if column is not None:
            chosen[field] = column
        elif field in columns or (field == "prompt" and need_prompt):
            _refuse_columns(path, rows, found, wanted, field)
    return chosen


def _refuse_columns(path: Path, rows: list[FileRow], found: Iterable[str], wanted: Sequence[str], field: str) -> None:
    if not found:
        reason = next((f"{row.place}: {row.fault}" for row in rows), "it is empty")
        raise UserError(f"{show(path)} has no usable row ({reason}); give it prompts")
    columns = ", ".join(repr(name[:40]) for name in list(found)[:20])
    expected = " or ".join(repr(name[:40]) for name in wanted)
    raise UserError(
        f"{show(path)} has the columns {columns}; expected {expected}; name the right one with --map {field}=COLUMN, "
        "which --prompts, --benign and own-... sets heed (a public set is read as its authors publish it)"
    )


def _rename(rows: Iterable[FileRow], chosen: Mapping[str, str]) -> list[FileRow]:
    """Rows whose cells have the names of FIELDS too; a column that happens to be called so is not taken for a field."""
    names = set(chosen.values())
    return [
        FileRow(
            row.place,
            {k: v for k, v in row.cells.items() if k not in FIELDS or k in names}
            | {field: row.cells.get(column) for field, column in chosen.items()},
            row.fault,
        )
        for row in rows
    ]
