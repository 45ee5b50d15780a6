"""The public sets by name: one table, and `load_benchmark`, which makes samples of a local copy or of the hub's.

Where files come from: a file, a folder (a clone of the set's repository, or what was unpacked there), an address on the
hub (hf://datasets/OWNER/NAME@REVISION), or nothing: the set's own place on the hub. Layouts are those that the authors
publish; docs/reference/data.md lists them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..run.records import Kind, Sample
from .hub import fetch, parse_address
from .prompts import Loaded, Place
from .readers import (
    Found,
    advbench_coco,
    companions,
    custom,
    figstep,
    jailbreakv,
    mm_safetybench,
    msts,
    table,
    vqav2,
    xstest,
)
from .rows import show

LANGUAGES = (
    *("english", "arabic", "chinese", "farsi", "french", "german"),
    *("hindi", "italian", "korean", "russian", "spanish"),
)


class Benchmark(NamedTuple):
    """One line of the table."""

    kind: Kind
    size: str
    licence: str
    citation: str
    load: Callable[[Found], Loaded]
    files: tuple[str, ...]
    """Patterns below a folder; the first that matches is read. {split} stands for the split."""
    hub: str = ""
    """Data set on the hub; "" where its authors put none there."""
    hub_files: tuple[str, ...] = ()
    """What is fetched."""
    columns: Mapping[str, str] = {}
    images: tuple[str, ...] = ()
    """Where its images are below --image-root or the folder; () for a set without images of its own."""
    hub_images: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("",)
    """The first is the usual one."""
    home: str = ""
    """Where its authors publish it."""


class Dataset(NamedTuple):
    """A loaded set."""

    samples: list[Sample]
    skipped: list[str]
    roots: dict[str, Path]
    """Folders of its images, for `load_image`."""
    source: dict[str, Any]
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
        UserError: unknown name or split, files that are not there or have another layout, or no usable row.
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


def parse_request(text: str) -> tuple[str, str | None, str | None]:
    """(name, split or None, path or None) of NAME[/SPLIT][:PATH]."""
    head, colon, path = text.partition(":")
    name, slash, split = head.partition("/")
    if name not in BENCHMARKS:
        raise UserError(f"there is no data set {name!r}; expected one of: {', '.join(BENCHMARKS)}")
    if (colon and not path) or (slash and not split):
        raise UserError(f"{text!r} is not finished; expected NAME, NAME:PATH or NAME/SPLIT:PATH")
    return name, split or None, path or None


def split_requests(text: str) -> list[str]:
    """Cuts NAME:PATH,NAME:PATH where a name of the table follows the comma, so that paths may hold commas."""
    names = "|".join(sorted(map(re.escape, BENCHMARKS), key=len, reverse=True))
    return re.split(rf",(?=(?:{names})(?:[/:,]|$))", text)


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
        raise UserError(f"{show(path)} is not there; expected a file or a folder of {name}")
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


# ---- the table

_JAILBREAKV: dict[str, Any] = {
    "licence": "MIT",
    "citation": "Luo et al., JailBreakV-28K, COLM 2024, arXiv 2404.03027",
    "hub": "JailbreakV-28K/JailBreakV-28k",
    "home": "https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k",
}
_WITH_IMAGES: dict[str, Any] = _JAILBREAKV | {
    "load": jailbreakv,
    "columns": {"prompt": "jailbreak_query", "category": "policy", "id": "id", "image": "image_path"},
    "images": ("JailBreakV_28K",),
    "hub_images": ("JailBreakV_28K/*/*",),
    "splits": ("images", "text"),
}
_ADVBENCH: dict[str, Any] = {
    "licence": "MIT",
    "citation": "Zou et al., Universal and Transferable Adversarial Attacks, 2023, arXiv 2307.15043",
    "files": ("*harmful_behaviors.csv", "data/advbench/harmful_behaviors.csv", "data/train-*.parquet"),
    "hub": "walledai/AdvBench",
    "hub_files": ("data/train-*.parquet",),
    "home": "https://github.com/llm-attacks/llm-attacks",
}
_XSTEST: dict[str, Any] = {
    "load": xstest,
    "licence": "CC-BY-4.0",
    "citation": "Röttger et al., XSTest, NAACL 2024, arXiv 2308.01263",
    "files": ("xstest*prompts.csv", "data/test-*.parquet"),
    "hub": "walledai/XSTest",
    "hub_files": ("data/test-*.parquet",),
    "columns": {"prompt": "prompt", "category": "type"},
    "home": "https://github.com/paul-rottger/xstest",
}
_JBB: dict[str, Any] = {
    "load": table,
    "licence": "MIT",
    "citation": "Chao et al., JailbreakBench, NeurIPS 2024, arXiv 2404.01318",
    "hub": "JailbreakBench/JBB-Behaviors",
    "columns": {"prompt": "Goal", "category": "Category", "id": "Index"},
    "home": "https://github.com/JailbreakBench/jailbreakbench",
}
_OWN: dict[str, Any] = {
    "size": "any",
    "licence": "yours",
    "citation": "",
    "load": table,
    "files": ("*.csv", "*.tsv", "*.jsonl", "*.parquet"),
}

BENCHMARKS: dict[str, Benchmark] = {
    "redteam2k": Benchmark(
        "harmful",
        "2,000 requests",
        load=table,
        files=("RedTeam_2K.csv", "JailBreakV_28K/RedTeam_2K.csv", "RedTeam2K.csv"),
        hub_files=("JailBreakV_28K/RedTeam_2K.csv",),
        columns={"prompt": "question", "category": "policy", "id": "id"},
        **_JAILBREAKV,
    ),
    "jailbreakv-mini": Benchmark(
        "harmful",
        "280 attacks, their images",
        files=("mini_JailBreakV_28K.csv", "JailBreakV_28K/mini_JailBreakV_28K.csv"),
        hub_files=("JailBreakV_28K/mini_JailBreakV_28K.csv",),
        **_WITH_IMAGES,
    ),
    "jailbreakv": Benchmark(
        "harmful",
        "28,000 attacks, their images",
        files=("JailBreakV_28K.csv", "JailBreakV_28K/JailBreakV_28K.csv"),
        hub_files=("JailBreakV_28K/JailBreakV_28K.csv",),
        **_WITH_IMAGES,
    ),
    "advbench": Benchmark("harmful", "520 requests", load=table, **_ADVBENCH),
    "advbench-coco": Benchmark(
        "harmful",
        "510 requests, each with a COCO image",
        load=advbench_coco,
        images=("val2014", "val2017"),
        **_ADVBENCH,
    ),
    "custom": Benchmark("harmful", "10 AdvBench or own requests x 10 images", load=custom, **_ADVBENCH),
    "jbb-harmful": Benchmark(
        "harmful",
        "100 requests",
        files=("*harmful-behaviors.csv", "data/harmful-behaviors.csv"),
        hub_files=("data/harmful-behaviors.csv",),
        **_JBB,
    ),
    "jbb-benign": Benchmark(
        "benign",
        "100 harmless twins",
        files=("*benign-behaviors.csv", "data/benign-behaviors.csv"),
        hub_files=("data/benign-behaviors.csv",),
        **_JBB,
    ),
    "xstest-safe": Benchmark("benign", "250 safe prompts", **_XSTEST),
    "xstest-unsafe": Benchmark("harmful", "200 unsafe contrasts", **_XSTEST),
    "mm-safetybench": Benchmark(
        "harmful",
        "1,680 questions a split",
        "CC-BY-NC-4.0",
        "Liu et al., MM-SafetyBench, ECCV 2024, arXiv 2311.17600",
        mm_safetybench,
        files=("data/processed_questions/*.json", "processed_questions/*.json", "*.json", "data/*/{split}.parquet"),
        hub="PKU-Alignment/MM-SafetyBench",
        hub_files=("data/*/{split}.parquet",),
        images=("data/imgs", "imgs", "MM-SafetyBench_imgs"),
        splits=("SD_TYPO", "SD", "TYPO"),
        home="https://github.com/isXinLiu/MM-SafetyBench",
    ),
    "figstep": Benchmark(
        "harmful",
        "500 pictures of a request (tiny: 50)",
        "MIT",
        "Gong et al., FigStep, AAAI 2025, arXiv 2311.05608",
        figstep,
        files=("data/question/{split}.csv", "question/{split}.csv", "{split}.csv"),
        columns={"category": "category_name"},
        images=("data/images/SafeBench", "images/SafeBench", "../images/SafeBench"),
        splits=("safebench", "SafeBench-Tiny"),
        home="https://github.com/ThuCCSLab/FigStep",
    ),
    "harmbench": Benchmark(
        "harmful",
        "110 requests, their images",
        "MIT",
        "Mazeika et al., HarmBench, ICML 2024, arXiv 2402.04249",
        table,
        files=(
            "data/behavior_datasets/harmbench_behaviors_multimodal_all.csv",
            "behavior_datasets/harmbench_behaviors_multimodal_all.csv",
            "harmbench_behaviors_multimodal_all.csv",
        ),
        columns={
            "prompt": "Behavior",
            "category": "SemanticCategory",
            "id": "BehaviorID",
            "image": "ImageFileName",
        },
        images=("data/multimodal_behavior_images", "multimodal_behavior_images", "../multimodal_behavior_images"),
        home="https://github.com/centerforaisafety/HarmBench",
    ),
    "msts": Benchmark(
        "harmful",
        "400 questions in English, 200 in each of ten languages",
        "CC-BY-4.0, images under their own",
        "Röttger et al., MSTS, 2025, arXiv 2501.10057",
        msts,
        files=(
            "data/prompts/{split}_multimodal.csv",
            "prompts/{split}_multimodal.csv",
            "{split}_multimodal.csv",
            "data/{split}-*.parquet",
        ),
        hub="felfri/MSTS",
        hub_files=("data/{split}-*.parquet",),
        columns={"prompt": "prompt_text", "category": "hazard_category", "image": "unsafe_image_id"},
        images=("data/unsafe_images", "unsafe_images", "../unsafe_images"),
        splits=LANGUAGES,
        home="https://github.com/paul-rottger/msts-multimodal-safety",
    ),
    "vqav2": Benchmark(
        "vqa",
        "214,354 questions (train: 443,757)",
        "CC-BY-4.0, images under Flickr's terms",
        "Goyal et al., Making the V in VQA Matter, CVPR 2017",
        vqav2,
        files=(
            "v2_OpenEnded_mscoco_{part}_questions.json",
            "questions/v2_OpenEnded_mscoco_{part}_questions.json",
            "data/{split}-*.parquet",
        ),
        hub="lmms-lab/VQAv2",
        hub_files=("data/{split}-00000-of-*.parquet",),
        images=("{part}", "images/{part}", "../images/{part}"),
        splits=("validation", "train"),
        home="https://visualqa.org/download.html",
    ),
    "own-harmful": Benchmark("harmful", **_OWN),
    "own-benign": Benchmark("benign", **_OWN),
    "own-vqa": Benchmark("vqa", **_OWN),
}
