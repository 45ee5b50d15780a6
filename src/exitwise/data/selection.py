"""Selects samples from files, public sets and the built-in ones, and pairs them with images."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import count, islice
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import UserError
from ..run import directory
from ..run.progress import Progress
from ..run.records import Kind, Sample
from . import controls, images, prompts, vqa
from .catalogue import BENCHMARKS, SetAddress
from .config import DataConfig, SelectionConfig
from .readers import draw, place_of
from .sets import Dataset, count_reasons, load_benchmark, sha256

Split = Literal["train", "test"]
N_SHOWN = 20
"""Skipped rows that are printed in full."""


class Selection(NamedTuple):
    """The samples to ask, and where they and their images come from."""

    samples: list[Sample]
    """Harmful, benign, then VQA."""
    skipped: list[str]
    """Rows and images that cannot be used, one line each: FILE, line N: reason."""
    roots: dict[str, Path]
    """Folders of the images, for `load_image`."""
    sources: list[Mapping[str, object]]
    """One entry a file or set: sha256, revision, licence, counts."""


def load_samples(data: DataConfig, chosen: SelectionConfig, seed: int, split: Split = "test") -> Selection:
    """Reads the data, selects the samples and pairs them with images.

    Args:
        seed: of the draw of VQA questions and of the sets that are drawn at random (custom, advbench-coco).
        split: of the built-in prompts, questions and photographs: "test" for audits, "train" for training.

    Raises:
        UserError: a file, folder or set cannot be read, or holds nothing usable.
    """
    photographs, skipped = photographs_of(data.images, split)
    sets = _files(data, "harmful", data.prompts) + _files(data, "benign", data.benign) + _sets(data, seed)
    present = {kind for kind, _ in sets}
    sets += [entry for entry in _builtin(chosen, seed, split) if entry[0] not in present]
    roots = {"file": data.images} if data.images else {}
    samples: list[Sample] = []
    sources: list[Mapping[str, object]] = []
    for wanted in ("harmful", "benign", "vqa"):
        for kind, found in sets:
            if kind == wanted:
                asked, broken = _without_broken(_selected(chosen, seed, kind, found), found.roots)
                if chosen.controls and kind == "harmful":
                    samples += controls.make_controls(asked)
                samples += _with_images(asked, photographs, chosen.cross)
                skipped += found.skipped + broken
                reasons = count_reasons(found.skipped + broken)
                counts = {"usable": len(found.samples), "samples": len(asked), "skipped": reasons}
                sources.append({**found.source, **counts})
                _add_roots(roots, found.roots)
    return Selection(_unique(samples), skipped, roots, sources)


def _add_roots(roots: dict[str, Path], more: dict[str, Path]) -> None:
    for name, folder in more.items():
        if roots.setdefault(name, folder) != folder:
            raise UserError(f"the images of {name} are in {roots[name]} and in {folder}; give both parts one folder")


def photographs_of(folder: Path | None, split: Split) -> tuple[list[str], list[str]]:
    """(names of the images to pair with prompts that have none, files of `folder` that cannot be read)."""
    if not folder:
        builtin = images.BUILTIN_PHOTOGRAPHS if split == "test" else images.TRAINING_PHOTOGRAPHS
        return [f"photo:{name}" for name in builtin], []
    names, broken = images.list_images(folder)
    if not names:
        raise UserError(f"no readable image in {folder} ({len(broken)} skipped); expected PNG, JPEG, WebP or GIF files")
    return names, [f"{path}: {reason}" for path, reason in broken]


def _files(data: DataConfig, kind: Kind, files: tuple[Path, ...]) -> list[tuple[Kind, Dataset]]:
    """The files of --prompts or --benign, as one set."""
    if not files:
        return []
    root = data.image_roots.get("", files[0].parent)
    samples, skipped, hashes = [], [], {}
    for file in files:
        loaded = prompts.load_prompts(file, kind, data.columns, place=prompts.Place("own", root))
        samples += loaded.samples
        skipped += loaded.skipped
        hashes[str(file)] = sha256(file)
    source = {"set": "own files", "kind": kind, "files": hashes}
    return [(kind, Dataset(samples, skipped, {"own": root} if "image" in data.columns else {}, source))]


def _sets(data: DataConfig, seed: int) -> list[tuple[Kind, Dataset]]:
    """The sets of --data in their order; advbench-coco leaves out the prompts of a custom set."""
    loaded: dict[int, Dataset] = {}
    held: set[str] = set()
    for i, address in sorted(enumerate(data.requests), key=lambda item: item[1].name != "custom"):
        loaded[i] = _one_set(data, address, seed, held)
        if address.name == "custom":
            held |= {sample.prompt for sample in loaded[i].samples}
    return [(BENCHMARKS[address.name].kind, loaded[i]) for i, address in enumerate(data.requests)]


def _one_set(data: DataConfig, address: SetAddress, seed: int, held: Collection[str]) -> Dataset:
    (name, split, path), roots = address, data.image_roots
    root = roots.get(name, roots.get(""))
    if name in ("custom", "advbench-coco"):  # any photographs will do, but those of another set are not meant
        root = roots.get(name) or (root if name == "advbench-coco" else None) or data.images
    return load_benchmark(name, path, root, split, seed, columns=data.columns, hold_out=held)


def _builtin(chosen: SelectionConfig, seed: int, split: Split) -> list[tuple[Kind, Dataset]]:
    sets: list[tuple[Kind, Dataset]] = []
    asked: tuple[tuple[Kind, Callable[..., list[Sample]], bool], ...] = (
        ("harmful", prompts.builtin_harmful, True),
        ("benign", prompts.builtin_benign, chosen.over_refusal),
    )
    for kind, builtin, wanted in asked:
        if wanted:
            source = {"set": "built-in", "kind": kind, "licence": "Apache-2.0"}
            sets.append((kind, Dataset(builtin(split), [], {}, source)))
    if chosen.vqa:
        questions = vqa.easy_vqa(split, n=chosen.vqa, images=max(1, chosen.vqa // 6), seed=seed)
        source = {"set": "easy-vqa", "kind": "vqa", "revision": metadata.version("easy-vqa"), "licence": "MIT"}
        sets.append(("vqa", Dataset(questions, [], {}, source)))
    return sets


def _selected(chosen: SelectionConfig, seed: int, kind: Kind, found: Dataset) -> list[Sample]:
    if kind == "vqa":
        return draw(found.samples, chosen.vqa, seed)
    return _spread(found.samples, chosen.limit) if chosen.limit is not None else found.samples


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


def _with_images(samples: list[Sample], names: list[str], cross: bool) -> list[Sample]:
    """Photographs for prompts that came without images; a VQA question without one stays so."""
    if not samples or samples[0].image or samples[0].kind == "vqa":
        return samples
    return (prompts.cross if cross else prompts.attach_images)(samples, names)


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


def report_skipped(lines: Sequence[str], progress: Progress) -> None:
    """Prints the first skipped rows, and counts the others by reason; config.json and plan.json hold all."""
    for line in lines[:N_SHOWN]:
        progress.say(f"skipped {line}")
    if len(lines) > N_SHOWN:
        progress.say(f"skipped {len(lines) - N_SHOWN} more; config.json names them")
        for reason, n in count_reasons(lines).items():
            progress.say(f"    {n} x {reason}")


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
