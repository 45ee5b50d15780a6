"""Writes small files as data sets have them: tables, Parquet files, pictures, VQA-v2."""

import csv
import io
import json
from pathlib import Path

from PIL import Image

from exitwise.data.images import load_image
from exitwise.run.records import Sample


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def packed(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def colour_of(dataset, sample: Sample) -> tuple[int, ...]:
    found = load_image(sample.image, dataset.roots).getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


def vqa_files(folder: Path, questions: list[dict], annotations: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def answers(*texts: str) -> list[dict]:
    return [{"answer": t, "answer_confidence": "yes", "answer_id": i} for i, t in enumerate(texts, start=1)]


TEN = ("net", "net", "netting", "mesh", "net", "pitcher", "orange", "net", "net", "yes")
