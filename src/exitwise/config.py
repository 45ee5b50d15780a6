"""What an audit can be asked. The command line is made from this class (tyro), and config.json holds its fields."""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from .data.benchmarks import BENCHMARKS, parse_request, split_requests
from .data.prompts import FIELDS
from .errors import UserError
from .judges import parse_judges

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
SAVED_DTYPES = DTYPES[:4]


@dataclass(frozen=True)
class AuditConfig:
    """What an audit asks; every field lands in config.json."""

    model: Positional[str]
    """testbed, testbed-control, a folder or a hub id of a model of a supported family (docs/families.md)."""
    adapter: str | None = None
    """A PEFT adapter for the language model: a folder, a hub id, or the run directory of `exitwise align`."""
    exits: str = "all"
    """all, default, early, middle, late, numbers and ranges, separated by commas: default,0-3,late.
    Layers joined by + are one exit that fuses them: 3+18+23."""
    data: UseAppendAction[tuple[str, ...]] = ()
    """Public sets and own rows: NAME[/SPLIT][:PATH], several with commas or with the flag again. PATH is a file, a
    folder or hf://datasets/OWNER/NAME[@REVISION][/FILE]; a name alone is fetched from the hub. Names: docs/data.md."""
    image_root: tuple[str, ...] = ()
    """Folder of the images that the sets of --data name; NAME=FOLDER for one of them."""
    map: str | None = None
    """Columns of your own files: prompt=COLUMN,category=COLUMN,id=COLUMN,image=COLUMN,answers=COLUMN."""
    prompts: tuple[Path, ...] = ()
    """Files of harmful prompts (CSV, TSV, JSONL, JSON, TXT, each also .gz, or Parquet). Without harmful prompts from
    here or from --data, the built-in ones."""
    benign: tuple[Path, ...] = ()
    """Files of harmless prompts, for over-refusal; without any here or in --data, the built-in ones."""
    over_refusal: bool = True
    """Ask harmless prompts too."""
    limit: int | None = None
    """Take only so many prompts of each kind, and of each set of --data: the first of every policy, then the
    second, and so on."""
    images: Path | None = None
    """A folder of images to go with the prompts; without it, ten photographs that scikit-image carries."""
    cross: bool = False
    """Ask every prompt about every image, instead of one image per prompt."""
    controls: bool = False
    """Ask every harmful prompt with a blank image, with noise and without an image too; reported apart."""
    vqa: int = 60
    """Questions that measure utility, of each VQA set in --data, else of easy-VQA; 0 for none."""
    judge: str = "refusal"
    """Who reads the answers: refusal (a matcher with a coherence gate, no model), a guard, rubric (docs/judges.md).
    Several with commas; the first one's verdicts make the figures."""
    max_new_tokens: int = 32
    """Tokens of an answer at the most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability."""
    seed: int = 0
    """Of sampling, of the choice of VQA items and of bootstrap intervals."""
    batch_size: int | None = None
    """Rows of a batch; without it, what fits the memory."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto is float32 on a CPU and the checkpoint's own elsewhere; int8 and int4 quantise
    the language model (bitsandbytes or torchao)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is the first GPU where there is one, spread all of them together."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        ranges: tuple[tuple[str, float, float], ...] = (
            ("limit", 1, 10**9),
            ("vqa", 0, 10**6),
            ("max_new_tokens", 1, inf),
            ("batch_size", 1, inf),
            ("temperature", 0, 100),
            ("top_p", 1e-9, 1),
            ("seed", 0, inf),
        )
        check_ranges(self, ranges)
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype got {self.dtype!r}; expected one of: {', '.join(DTYPES)}")
        parse_judges(self.judge)
        self.columns()
        self.image_roots()
        kinds = {BENCHMARKS[name].kind for name, _, _ in self.requests()}
        if not self.over_refusal and (self.benign or "benign" in kinds):
            raise UserError("--no-over-refusal asks no harmless prompts, but --benign or --data names some; drop one")
        if not self.vqa and "vqa" in kinds:
            raise UserError("--vqa 0 asks no questions, but --data names a VQA set; drop one")

    def requests(self) -> list[tuple[str, str | None, str | None]]:
        """(name, split, path) of each set in --data; raises UserError for an unknown one."""
        return [parse_request(part) for text in self.data for part in split_requests(text)]

    def columns(self) -> dict[str, str]:
        """{field: column} of --map; raises UserError where it has another form."""
        pairs = [part.partition("=") for part in (self.map or "").split(",") if part]
        for field, _, column in pairs:
            if field not in FIELDS or not column:
                raise UserError(f"--map got {self.map!r}; expected FIELD=COLUMN,... with FIELD of {', '.join(FIELDS)}")
        if len({field for field, _, _ in pairs}) < len(pairs):
            raise UserError(f"--map got {self.map!r}, which maps a field twice; name each once")
        return {field: column for field, _, column in pairs}

    def image_roots(self) -> dict[str, Path]:
        """{name of a set, or "" for all others: folder} of --image-root; raises UserError where one is no folder."""
        roots = {}
        for text in self.image_root:
            name, equals, folder = text.partition("=")
            name, folder = (name, folder) if equals and name in BENCHMARKS else ("", text)
            if not Path(folder).is_dir():
                raise UserError(f"--image-root got {text!r}, which is not a folder; expected FOLDER or NAME=FOLDER")
            roots[name] = Path(folder)
        return roots


@dataclass(frozen=True)
class RewardConfig:
    """What a reward model is trained on, and how; every field lands in config.json."""

    backbone: Positional[str]
    """testbed, a folder or a hub id: a vision-language model (its language model is taken) or a text model."""
    pairs: tuple[str, ...]
    """Files of preference pairs, or data sets on the hub such as Anthropic/hh-rlhf:harmless-base."""
    held_out: tuple[str, ...] = ()
    """Files of pairs to measure on; without any, a share of the prompts is kept out of training."""
    held_out_share: float = 0.15
    """That share; every pair of a prompt goes the same way."""
    limit: int | None = None
    """Take only so many pairs of each file."""
    tuning: str = "lora"
    """lora (an adapter; shares the policy's backbone) or full (all weights of the language model)."""
    rank: int = 8
    """Of LoRA; its scale is twice the rank."""
    lr: float | None = None
    """Peak learning rate of AdamW; without it, 1e-3 for lora and 1e-5 for full."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls to 0 as a cosine."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Longer gradients are cut to this."""
    epochs: int = 1
    """Times every pair is seen. Reward models overfit soon: more than one is seldom better."""
    batch_size: int = 16
    """Pairs of an optimizer step."""
    micro_tokens: int = 1024
    """Tokens of one forward and backward pass, padding included; bounds the memory, and changes no gradient."""
    max_length: int = 512
    """Tokens of a dialogue with its answer; of what is longer the end is kept."""
    checkpoint_every: int = 20
    """Steps."""
    seed: int = 0
    """Of the split, the order of the pairs and the adapter's first weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is the first GPU where there is one."""

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        if not self.pairs:
            raise UserError("--pairs got nothing; expected files of preference pairs, or hub ids")
        if self.tuning not in ("lora", "full"):
            raise UserError(f"--tuning got {self.tuning!r}; expected lora or full")
        ranges: tuple[tuple[str, float, float], ...] = (
            ("held_out_share", 0.01, 0.9),
            ("limit", 1, 10**9),
            ("rank", 1, 1024),
            ("lr", 1e-9, 1),
            ("warmup", 0, 1),
            ("weight_decay", 0, 10),
            ("max_grad_norm", 1e-9, inf),
            ("epochs", 1, 1000),
            ("batch_size", 1, inf),
            ("micro_tokens", 1, inf),
            ("max_length", 8, inf),
            ("checkpoint_every", 1, inf),
            ("seed", 0, inf),
        )
        check_ranges(self, ranges)


def check_ranges(config: object, ranges: tuple[tuple[str, float, float], ...]) -> None:
    """Raises UserError where a field of (name, least, most) is out of range; None is not set and passes."""
    for name, low, high in ranges:
        value = getattr(config, name)
        if value is not None and (value == inf or not low <= value <= high):
            wanted = f"at least {low}, and finite" if value == inf else f"at least {low}"
            wanted = wanted if high == inf else f"{low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} got {value}; expected {wanted}")


@dataclass(frozen=True)
class SlimConfig:
    """What a slim checkpoint is made from."""

    model: Positional[str]
    """testbed, testbed-control, a folder or a hub id of a model of a supported family."""
    exit: int
    """The exit to cut at: the number of encoder blocks that stay."""
    adapter: str | None = None
    """A PEFT adapter to merge: a folder, a hub id, or the run directory of `exitwise align`."""
    audit: Path | None = None
    """The run directory of an audit of this model with this adapter; its figures go into the model card."""
    check: bool = False
    """Load the result with transformers and compare logits and greedy tokens with the full model at that exit; keep
    nothing where they differ."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto is what the source is saved in."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is the first GPU where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    def check_values(self) -> None:
        """Raises UserError for a value out of range; whether the exit is there shows when the model is loaded."""
        if self.exit < 0:
            raise UserError(f"--exit got {self.exit}; expected the number of encoder blocks that stay, 1 or more")
        if self.dtype not in SAVED_DTYPES:
            raise UserError(f"--dtype got {self.dtype!r}; expected one of: {', '.join(SAVED_DTYPES)}")
