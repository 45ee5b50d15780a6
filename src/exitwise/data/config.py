"""Options that name prompts and images (`DataConfig`), and options that choose among them (`SelectionConfig`)."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tyro.conf import UseAppendAction

from ..errors import UserError, check_ranges
from .catalogue import BENCHMARKS, SetAddress, parse_request, split_requests
from .prompts import FIELDS


@dataclass(frozen=True)
class DataConfig:
    """Files, public data sets and folders that prompts and images are read from."""

    data: UseAppendAction[tuple[str, ...]] = ()
    """Data sets to read, public ones or your own: `NAME[/SPLIT][:PATH]`. Separate several by commas, or repeat the
    option. PATH is a file, a folder or `hf://datasets/OWNER/NAME[@REVISION][/FILE]`; without it, the set is downloaded
    from the Hugging Face hub. Names: docs/reference/data.md."""
    image_root: tuple[str, ...] = ()
    """Folder of the images that the sets of --data refer to; NAME=FOLDER sets it for one data set."""
    map: str | None = None
    """Columns of your own files: prompt=COLUMN,category=COLUMN,id=COLUMN,image=COLUMN,answers=COLUMN."""
    prompts: tuple[Path, ...] = ()
    """Files of harmful prompts (CSV, TSV, JSONL, JSON, TXT, each also .gz, or Parquet). Without harmful prompts here
    or in --data, the built-in ones are used: an audit takes the test split, an alignment the training split."""
    benign: tuple[Path, ...] = ()
    """Files of harmless prompts, to measure or to limit over-refusal; the built-in ones are used as for --prompts."""
    images: Path | None = None
    """Folder of images to pair with prompts that have none. Without it, photographs shipped with scikit-image are used:
    ten for an audit, nine others for an alignment."""

    def check(self) -> None:
        """Raises UserError where a data set, a column or an image folder cannot be what the option says."""
        _ = self.requests, self.columns, self.image_roots

    @cached_property
    def requests(self) -> tuple[SetAddress, ...]:
        """The data sets of --data; raises UserError for an unknown name."""
        return tuple(parse_request(part) for text in self.data for part in split_requests(text))

    @cached_property
    def columns(self) -> dict[str, str]:
        """{field: column} of --map; raises UserError where it has another form."""
        pairs = [part.partition("=") for part in (self.map or "").split(",") if part]
        for field, _, column in pairs:
            if field not in FIELDS or not column:
                raise UserError(f"--map got {self.map!r}; expected FIELD=COLUMN,... with FIELD of {', '.join(FIELDS)}")
        if len({field for field, _, _ in pairs}) < len(pairs):
            raise UserError(f"--map got {self.map!r}, which maps a field twice; name each once")
        return {field: column for field, _, column in pairs}

    @cached_property
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
class SelectionConfig:
    """Which of the samples are used, how many, and with which images."""

    over_refusal: bool = True
    """Measure over-refusal: add harmless prompts to the harmful ones."""
    limit: int | None = None
    """Maximum number of harmful prompts, of harmless prompts, and of prompts of each set in --data. They are taken in
    turn from each category. Without it, all are used."""
    cross: bool = False
    """Pair every prompt with every image, instead of one image per prompt."""
    controls: bool = False
    """Repeat every harmful prompt with a grey image, with a noise image and without an image; these controls are
    reported separately."""
    vqa: int = 60
    """Number of questions that measure utility, from each VQA set in --data, else from easy-VQA; 0 for none."""

    def check(self, data: DataConfig) -> None:
        """Raises UserError for a value out of range, or for data that an option excludes."""
        check_ranges(self, (("limit", 1, 10**9), ("vqa", 0, 10**6)))
        kinds = {BENCHMARKS[request.name].kind for request in data.requests}
        if not self.over_refusal and (data.benign or "benign" in kinds):
            raise UserError(
                "--no-over-refusal leaves out harmless prompts, but --benign or --data names some; drop one"
            )
        if not self.vqa and "vqa" in kinds:
            raise UserError("--vqa 0 leaves out VQA questions, but --data names a VQA set; drop one")
