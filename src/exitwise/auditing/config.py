"""What an audit can be asked. The command line is made from this class (tyro), and config.json holds its fields."""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from ..data.catalogue import BENCHMARKS, parse_request, split_requests
from ..data.prompts import FIELDS
from ..errors import UserError, check_ranges
from ..judges import parse_judges
from ..model.dtypes import DTYPES


@dataclass(frozen=True)
class AuditConfig:
    """What an audit asks; every field lands in config.json."""

    model: Positional[str]
    """testbed, testbed-control, a folder or a hub id of a model of a supported family (docs/reference/families.md)."""
    adapter: str | None = None
    """A PEFT adapter for the language model: a folder, a hub id, or the run directory of `exitwise align`."""
    exits: str = "all"
    """all, default, early, middle, late, numbers and ranges, separated by commas: default,0-3,late.
    Layers joined by + are one exit that fuses them: 3+18+23."""
    data: UseAppendAction[tuple[str, ...]] = ()
    """Public sets and own rows: `NAME[/SPLIT][:PATH]`, several with commas or with the flag again. PATH is a file, a
    folder or `hf://datasets/OWNER/NAME[@REVISION][/FILE]`; a name alone is fetched from the hub. Names:
    docs/reference/data.md."""
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
    """Who reads the answers: refusal (a matcher with a coherence gate, no model), a guard, rubric
    (docs/reference/judges.md). Several with commas; the first one's verdicts make the figures."""
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
