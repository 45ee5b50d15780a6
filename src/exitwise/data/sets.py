"""Loads a public data set by its name: finds its files, reads them into samples, and describes where they come from.

Files come from a path to one file, from a folder (a clone of the set's repository, or an unpacked archive), from an
address on the hub (hf://datasets/OWNER/NAME@REVISION), or, without a path, from the set's own place on the hub.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..run.records import Sample
from .catalogue import BENCHMARKS, Benchmark
from .hub import fetch, parse_address
from .prompts import Place
from .readers import Found, companions
from .rows import show


class Dataset(NamedTuple):
    """A loaded set."""

    samples: list[Sample]
    skipped: list[str]
    roots: dict[str, Path]
    """Folders of its images, for `load_image`."""
    source: Mapping[str, object]
    """What config.json keeps: files with sha256, revision, licence, citation, counts."""


def load_benchmark(
    name: str,
    path: Path | str | None = None,
    image_root: Path | None = None,
    split: str | None = None,
    seed: int = 0,
    *,
    columns: Mapping[str, str] | None = None,
    hold_out: Collection[str] = (),
) -> Dataset:
    """A set of BENCHMARKS as samples; those of a set without images have none ("").

    Args:
        path: a file, a folder, or an hf:// address; None is the set's place on the hub.
        image_root: folder of its images, where that is not the folder of the files.
        split: one of the set's splits; None is the usual one.
        seed: of the pairing of advbench-coco and of the draw of custom.
        columns: {field: column}, for the sets own-*.
        hold_out: prompts that advbench-coco leaves out; without any, those that custom draws with this seed.

    Raises:
        UserError: unknown name or split, files that do not exist or have another layout, or no usable row.
    """
    if name not in BENCHMARKS:
        raise UserError(f"there is no data set {name!r}; expected one of: {', '.join(BENCHMARKS)}")
    bench = BENCHMARKS[name]
    split = bench.splits[0] if split is None else split
    if split not in bench.splits:
        raise UserError(f"{name} has no split {split!r}; expected {', '.join(bench.splits) or 'none'}")
    folder, files, origin = _locate(name, bench, path, split, image_root)
    images = Place(name, _image_folder(bench, image_root or folder, split))
    prefix = name if split == bench.splits[0] else f"{name}-{split}"
    wanted = dict(columns or {}) if name.startswith("own-") else bench.columns
    loaded = bench.load(Found(name, prefix, bench.kind, split, files, images, image_root, wanted, seed, hold_out))
    if not loaded.samples:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in count_reasons(loaded.skipped).items())
        why = reasons or "it has none of this split"
        raise UserError(f"{name} has no usable row in {show(files[0])} ({why}); {_advice(name, bench)}")
    hashed = sorted({*files, *(f for q in files for f in companions(q))}) if bench.kind == "vqa" else files
    source = {
        "set": name,
        "kind": bench.kind,
        "split": split,
        **origin,
        "files": {_relative(file, folder): sha256(file) for file in hashed},
        "licence": bench.licence,
        "citation": bench.citation,
        "usable": len(loaded.samples),
        "skipped": count_reasons(loaded.skipped),
    }
    return Dataset(loaded.samples, loaded.skipped, {name: images.folder}, source)


def count_reasons(skipped: Sequence[str]) -> dict[str, int]:
    """How many lines of `skipped` give each reason; what is in brackets, and lengths, do not tell reasons apart."""
    reasons = (re.split(r", (?:line|item|row) [^:]*: ", line, maxsplit=1)[-1] for line in skipped)
    return dict(sorted(Counter(re.sub(r" \(.*|\d+ characters, ", "", reason) for reason in reasons).items()))


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---- where the files are


def _locate(
    name: str, bench: Benchmark, path: Path | str | None, split: str, image_root: Path | None
) -> tuple[Path, list[Path], dict[str, str]]:
    """(folder, files to read, where they are from)."""
    if path is None or str(path).startswith("hf:"):
        if path is None and not bench.hub:
            raise UserError(f"{name} is not on the hub; {_advice(name, bench)}")
        repo, revision, file = parse_address(str(path)) if path else (bench.hub, None, "")
        patterns = [file] if file else _fill(bench.hub_files, split)
        if not patterns:
            raise UserError(f"{path} names no file; expected hf://datasets/OWNER/NAME/FILE")
        snapshot = fetch(repo, patterns + ([] if image_root else list(bench.hub_images)), revision)
        files = _first(snapshot.folder, patterns)
        if not files:
            raise UserError(f"the data set {repo} has no {' or '.join(patterns)}; {_advice(name, bench)}")
        return snapshot.folder, files, {"from": repo, "revision": snapshot.revision}
    path = Path(path)
    if path.is_dir():
        patterns = _fill(bench.files, split)
        files = _first(path, patterns)
        if not files:
            raise UserError(f"{show(path)} holds no file of {name}; expected {' or '.join(patterns)} in it")
        return path, files, {"from": str(path), "revision": ""}
    if not path.is_file():
        raise UserError(f"{show(path)} does not exist; expected a file or a folder of {name}")
    return path.parent, [path], {"from": str(path), "revision": ""}


def _first(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return next((found for p in patterns if (found := sorted(f for f in folder.glob(p) if f.is_file()))), [])


def _fill(patterns: Sequence[str], split: str) -> list[str]:
    part = {"validation": "val2014", "train": "train2014"}.get(split, "")  # COCO's names, for VQA-v2
    return [pattern.format(split=split, part=part) for pattern in patterns]


def _image_folder(bench: Benchmark, base: Path, split: str) -> Path:
    return next((base / sub for sub in _fill(bench.images, split) if (base / sub).is_dir()), base)


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def _advice(name: str, bench: Benchmark) -> str:
    if name.startswith("own-"):
        return "name its columns, as in --map prompt=COLUMN,image=COLUMN,answers=COLUMN"
    images = " and its images with --image-root" if bench.images else ""
    return f"give its files as {name}:PATH{images}" + (f" (from {bench.home})" if bench.home else "")
