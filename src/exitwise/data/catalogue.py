"""The public data sets by name: licence, citation, files, columns and splits of each, and how `--data` names them.

The layouts are those that the authors publish; docs/reference/data.md lists them.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import UserError
from ..run.records import Kind
from .prompts import Loaded
from .readers import Found, advbench_coco, custom, figstep, jailbreakv, mm_safetybench, msts, table, vqav2, xstest

LANGUAGES = (
    *("english", "arabic", "chinese", "farsi", "french", "german"),
    *("hindi", "italian", "korean", "russian", "spanish"),
)


class Benchmark(NamedTuple):
    """A public data set: where its files are and how a row becomes a sample."""

    kind: Kind
    size: str
    licence: str
    citation: str
    load: Callable[[Found], Loaded]
    files: tuple[str, ...]
    """Glob patterns below a folder, the first match is read; {split} stands for the split."""
    hub: str = ""
    """Id of the data set on the hub; "" where its authors published none there."""
    hub_files: tuple[str, ...] = ()
    """Glob patterns of the files to download."""
    columns: Mapping[str, str] = {}
    images: tuple[str, ...] = ()
    """Folders of its images below --image-root or the folder, the first that exists; () for a set without images."""
    hub_images: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("",)
    """The first is the default."""
    home: str = ""
    """Address where its authors publish it."""


_REDTEAM2K = Benchmark(
    "harmful",
    "2,000 requests",
    "MIT",
    "Luo et al., JailBreakV-28K, COLM 2024, arXiv 2404.03027",
    table,
    files=("RedTeam_2K.csv", "JailBreakV_28K/RedTeam_2K.csv", "RedTeam2K.csv"),
    hub="JailbreakV-28K/JailBreakV-28k",
    hub_files=("JailBreakV_28K/RedTeam_2K.csv",),
    columns={"prompt": "question", "category": "policy", "id": "id"},
    home="https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k",
)
_JAILBREAKV = _REDTEAM2K._replace(
    size="28,000 attacks, their images",
    load=jailbreakv,
    files=("JailBreakV_28K.csv", "JailBreakV_28K/JailBreakV_28K.csv"),
    hub_files=("JailBreakV_28K/JailBreakV_28K.csv",),
    columns={"prompt": "jailbreak_query", "category": "policy", "id": "id", "image": "image_path"},
    images=("JailBreakV_28K",),
    hub_images=("JailBreakV_28K/*/*",),
    splits=("images", "text"),
)
_ADVBENCH = Benchmark(
    "harmful",
    "520 requests",
    "MIT",
    "Zou et al., Universal and Transferable Adversarial Attacks, 2023, arXiv 2307.15043",
    table,
    files=("*harmful_behaviors.csv", "data/advbench/harmful_behaviors.csv", "data/train-*.parquet"),
    hub="walledai/AdvBench",
    hub_files=("data/train-*.parquet",),
    home="https://github.com/llm-attacks/llm-attacks",
)
_XSTEST = Benchmark(
    "benign",
    "250 safe prompts",
    "CC-BY-4.0",
    "Röttger et al., XSTest, NAACL 2024, arXiv 2308.01263",
    xstest,
    files=("xstest*prompts.csv", "data/test-*.parquet"),
    hub="walledai/XSTest",
    hub_files=("data/test-*.parquet",),
    columns={"prompt": "prompt", "category": "type"},
    home="https://github.com/paul-rottger/xstest",
)
_JBB = Benchmark(
    "harmful",
    "100 requests",
    "MIT",
    "Chao et al., JailbreakBench, NeurIPS 2024, arXiv 2404.01318",
    table,
    files=("*harmful-behaviors.csv", "data/harmful-behaviors.csv"),
    hub="JailbreakBench/JBB-Behaviors",
    hub_files=("data/harmful-behaviors.csv",),
    columns={"prompt": "Goal", "category": "Category", "id": "Index"},
    home="https://github.com/JailbreakBench/jailbreakbench",
)
_OWN = Benchmark("harmful", "any", "yours", "", table, files=("*.csv", "*.tsv", "*.jsonl", "*.parquet"))

BENCHMARKS: dict[str, Benchmark] = {
    "redteam2k": _REDTEAM2K,
    "jailbreakv-mini": _JAILBREAKV._replace(
        size="280 attacks, their images",
        files=("mini_JailBreakV_28K.csv", "JailBreakV_28K/mini_JailBreakV_28K.csv"),
        hub_files=("JailBreakV_28K/mini_JailBreakV_28K.csv",),
    ),
    "jailbreakv": _JAILBREAKV,
    "advbench": _ADVBENCH,
    "advbench-coco": _ADVBENCH._replace(
        size="510 requests, each with a COCO image", load=advbench_coco, images=("val2014", "val2017")
    ),
    "custom": _ADVBENCH._replace(size="10 AdvBench or own requests x 10 images", load=custom),
    "jbb-harmful": _JBB,
    "jbb-benign": _JBB._replace(
        kind="benign",
        size="100 harmless twins",
        files=("*benign-behaviors.csv", "data/benign-behaviors.csv"),
        hub_files=("data/benign-behaviors.csv",),
    ),
    "xstest-safe": _XSTEST,
    "xstest-unsafe": _XSTEST._replace(kind="harmful", size="200 unsafe contrasts"),
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
    "own-harmful": _OWN,
    "own-benign": _OWN._replace(kind="benign"),
    "own-vqa": _OWN._replace(kind="vqa"),
}


class SetAddress(NamedTuple):
    """One data set of --data."""

    name: str
    """A key of BENCHMARKS."""
    split: str | None
    path: str | None
    """A file, a folder or an hf:// address."""


def parse_request(text: str) -> SetAddress:
    """Reads NAME[/SPLIT][:PATH]; raises UserError for an unknown name or where a part is missing."""
    head, colon, path = text.partition(":")
    name, slash, split = head.partition("/")
    if name not in BENCHMARKS:
        raise UserError(f"there is no data set {name!r}; expected one of: {', '.join(BENCHMARKS)}")
    if (colon and not path) or (slash and not split):
        raise UserError(f"{text!r} is incomplete; expected NAME, NAME:PATH or NAME/SPLIT:PATH")
    return SetAddress(name, split or None, path or None)


def split_requests(text: str) -> list[str]:
    """Splits NAME:PATH,NAME:PATH at each comma that a name of BENCHMARKS follows, so that paths may hold commas."""
    names = "|".join(sorted(map(re.escape, BENCHMARKS), key=len, reverse=True))
    return re.split(rf",(?=(?:{names})(?:[/:,]|$))", text)
