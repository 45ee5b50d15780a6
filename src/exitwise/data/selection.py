"""What an audit asks: the samples of a config, where they are from, and the pictures that go with them."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib import metadata
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..auditing.config import AuditConfig
from ..errors import UserError
from ..run import directory
from ..run.records import Kind, Sample
from . import controls, images, prompts, vqa
from .catalogue import BENCHMARKS, Dataset, count_reasons, load_benchmark, sha256
from .readers import draw, place_of

Split = Literal["train", "test"]


class Inputs(NamedTuple):
    """What `load_samples` found."""

    samples: list[Sample]
    """Harmful, benign, then VQA."""
    skipped: list[str]
    """What was skipped and why."""
    roots: dict[str, Path]
    """Folders of the images, for `load_image`."""
    sources: list[dict[str, Any]]
    """One entry a file or set: sha256, revision, licence, counts."""


def load_samples(config: AuditConfig, split: Split = "test") -> Inputs:
    """All samples of a config.

    Args:
        split: of what is built in, prompts, questions and photographs: "test" for audits, "train" for training.

    Raises:
        UserError: a file, folder or set cannot be read, or holds nothing usable.
    """
    photographs, skipped = photographs_of(config, split)
    sets = _files(config, "harmful", config.prompts) + _files(config, "benign", config.benign) + _sets(config)
    present = {kind for kind, _ in sets}
    sets += [entry for entry in _builtin(config, split) if entry[0] not in present]
    roots = {"file": config.images} if config.images else {}
    samples: list[Sample] = []
    sources = []
    for wanted in ("harmful", "benign", "vqa"):
        for kind, found in sets:
            if kind == wanted:
                asked, broken = _without_broken(_selected(config, kind, found), found.roots)
                if config.controls and kind == "harmful":
                    samples += controls.make_controls(asked)
                samples += _with_images(config, asked, photographs)
                skipped += found.skipped + broken
                reasons = count_reasons(found.skipped + broken)
                counts = {"usable": len(found.samples), "samples": len(asked), "skipped": reasons}
                sources.append(found.source | counts)
                _add_roots(roots, found.roots)
    return Inputs(_unique(samples), skipped, roots, sources)


def _add_roots(roots: dict[str, Path], more: dict[str, Path]) -> None:
    for name, folder in more.items():
        if roots.setdefault(name, folder) != folder:
            raise UserError(f"the images of {name} are in {roots[name]} and in {folder}; give both parts one folder")


def photographs_of(config: AuditConfig, split: Split) -> tuple[list[str], list[str]]:
    """(names of the images that go with prompts that have none, broken files)."""
    if not config.images:
        builtin = images.BUILTIN_PHOTOGRAPHS if split == "test" else images.TRAINING_PHOTOGRAPHS
        return [f"photo:{name}" for name in builtin], []
    names, broken = images.list_images(config.images)
    if not names:
        raise UserError(
            f"no readable image in {config.images} ({len(broken)} skipped); expected PNG, JPEG, WebP or GIF files"
        )
    return names, [f"{path}: {reason}" for path, reason in broken]


def _files(config: AuditConfig, kind: Kind, files: tuple[Path, ...]) -> list[tuple[Kind, Dataset]]:
    """The files of --prompts or --benign, as one set."""
    if not files:
        return []
    root = config.image_roots().get("", files[0].parent)
    samples, skipped, hashes = [], [], {}
    for file in files:
        loaded = prompts.load_prompts(file, kind, config.columns(), place=prompts.Place("own", root))
        samples += loaded.samples
        skipped += loaded.skipped
        hashes[str(file)] = sha256(file)
    source = {"set": "own files", "kind": kind, "files": hashes}
    return [(kind, Dataset(samples, skipped, {"own": root} if "image" in config.columns() else {}, source))]


def _sets(config: AuditConfig) -> list[tuple[Kind, Dataset]]:
    """The sets of --data in their order; advbench-coco leaves out what a custom set asks."""
    requests = config.requests()
    loaded: dict[int, Dataset] = {}
    held: set[str] = set()
    for i, (name, split, path) in sorted(enumerate(requests), key=lambda item: item[1][0] != "custom"):
        loaded[i] = _one_set(config, name, split, path, held)
        if name == "custom":
            held |= {sample.prompt for sample in loaded[i].samples}
    return [(BENCHMARKS[name].kind, loaded[i]) for i, (name, _, _) in enumerate(requests)]


def _one_set(config: AuditConfig, name: str, split: str | None, path: str | None, held: Collection[str]) -> Dataset:
    roots = config.image_roots()
    root = roots.get(name, roots.get(""))
    if name in ("custom", "advbench-coco"):  # any photographs will do, but those of another set are not meant
        root = roots.get(name) or (root if name == "advbench-coco" else None) or config.images
    return load_benchmark(name, path, root, split, config.seed, columns=config.columns(), hold_out=held)


def _builtin(config: AuditConfig, split: Split) -> list[tuple[Kind, Dataset]]:
    sets: list[tuple[Kind, Dataset]] = []
    asked: tuple[tuple[Kind, Callable[..., list[Sample]], bool], ...] = (
        ("harmful", prompts.builtin_harmful, True),
        ("benign", prompts.builtin_benign, config.over_refusal),
    )
    for kind, builtin, wanted in asked:
        if wanted:
            source = {"set": "built-in", "kind": kind, "licence": "Apache-2.0"}
            sets.append((kind, Dataset(builtin(split), [], {}, source)))
    if config.vqa:
        questions = vqa.easy_vqa(split, n=config.vqa, images=max(1, config.vqa // 6), seed=config.seed)
        source = {"set": "easy-vqa", "kind": "vqa", "revision": metadata.version("easy-vqa"), "licence": "MIT"}
        sets.append(("vqa", Dataset(questions, [], {}, source)))
    return sets


def _selected(config: AuditConfig, kind: Kind, found: Dataset) -> list[Sample]:
    if kind == "vqa":
        return draw(found.samples, config.vqa, config.seed)
    return _spread(found.samples, config.limit) if config.limit is not None else found.samples


def _spread(samples: list[Sample], limit: int) -> list[Sample]:
    """`limit` samples, taken in turn from each category in their order."""
    by_category: dict[str, list[Sample]] = {}
    for sample in samples:
        by_category.setdefault(sample.category, []).append(sample)
    rounds = (column[i] for i in range(len(samples)) for column in by_category.values() if i < len(column))
    return list(islice(rounds, limit))


def _without_broken(samples: list[Sample], roots: dict[str, Path]) -> tuple[list[Sample], list[str]]:
    """Drops samples whose own image does not decode: the loaders only saw that a file is there."""
    faults = {}
    for name in {s.image for s in samples if s.image.partition(":")[0] in {*roots, "unpacked"}}:
        try:
            images.load_image(name, roots)
        except UserError as error:
            faults[name] = str(error)
    kept = [s for s in samples if s.image not in faults]
    return kept, [f"{place_of(s)}: the image is broken ({faults[s.image]})" for s in samples if s.image in faults]


def _with_images(config: AuditConfig, samples: list[Sample], names: list[str]) -> list[Sample]:
    """Photographs for prompts that came without images; a VQA question without one stays so."""
    if not samples or samples[0].image or samples[0].kind == "vqa":
        return samples
    return (prompts.cross if config.cross else prompts.attach_images)(samples, names)


def _unique(samples: list[Sample]) -> list[Sample]:
    """Ids that several samples have (of two files of one name) get their kind in front, and a number if that fails."""
    taken, result = Counter(s.id for s in samples), []
    used = {s.id for s in samples if taken[s.id] == 1}
    for sample in samples:
        if taken[sample.id] > 1:
            names = (f"{sample.kind}/{sample.id}{'' if n == 1 else f'#{n}'}" for n in count(1))
            sample = replace(sample, id=next(name for name in names if name not in used))
            used.add(sample.id)
        result.append(sample)
    return result


def write_thumbnails(samples: list[Sample], roots: dict[str, Path], out: Path) -> None:
    """images/index.json and one small JPEG per image; also proves that every image can be read before work begins."""
    folder, index = out / "images", {}
    folder.mkdir(exist_ok=True)
    for name in dict.fromkeys(s.image for s in samples if s.image):
        file = hashlib.sha256(name.encode()).hexdigest()[:16] + ".jpg"
        scratch = folder / (file + ".tmp")
        scratch.write_bytes(images.thumbnail(images.load_image(name, roots)))
        os.replace(scratch, folder / file)
        index[name] = file
    directory.write_json(folder / "index.json", index)
