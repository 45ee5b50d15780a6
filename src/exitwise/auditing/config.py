"""Options of an audit; tyro makes the command line from this class, and config.json holds its fields."""

from dataclasses import dataclass, field
from math import inf
from os import PathLike
from typing import Self

from tyro.conf import OmitArgPrefixes, Positional

from ..data.config import DataConfig, SelectionConfig
from ..data.options import make_config, to_json
from ..errors import UserError, check_ranges
from ..judges import parse_judges
from ..model.dtypes import DTYPES


@dataclass(frozen=True)
class AuditConfig:
    """Model, exits, judge and decoding of an audit; config.json keeps every option."""

    model: Positional[str]
    """Model to audit: testbed, testbed-control, a folder or a hub id (families: docs/reference/families.md)."""
    adapter: str | None = None
    """PEFT adapter of the language model: a folder, a hub id, or the run directory of `exitwise align`."""
    exits: str = "all"
    """Exits of the image encoder to audit, separated by commas: numbers, ranges, all, default, early, middle, late, as
    in default,0-3,late. Layers joined by + are one exit that fuses them: 3+18+23."""
    inputs: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    selection: OmitArgPrefixes[SelectionConfig] = field(default_factory=SelectionConfig)
    judge: str = "refusal"
    """Judges of the answers, separated by commas: refusal (string matcher with a coherence gate, no model), a guard
    model, or rubric (docs/reference/judges.md). The figures are computed from the first one's verdicts."""
    max_new_tokens: int = 32
    """Maximum length of an answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with at least this probability."""
    seed: int = 0
    """Random seed of sampling, of the choice of VQA questions and of bootstrap intervals."""
    batch_size: int | None = None
    """Answers generated at a time; default: what fits the free memory."""
    dtype: str = "auto"
    """Precision of the weights: float32, bfloat16, float16, or auto (float32 on a CPU, the checkpoint's own on a GPU);
    int8 and int4 quantise the language model (bitsandbytes or torchao)."""
    device: str = "auto"
    """Device to run the model on: cpu, cuda, cuda:1 ..., spread (over all GPUs), or auto (the first GPU, else the
    CPU)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    @classmethod
    def of(cls, model: str | PathLike[str], **options: object) -> Self:
        """A config from flat keywords, those of `DataConfig` and `SelectionConfig` included.

        Raises:
            UserError: an unknown option, or a value of another type.
        """
        return make_config(cls, {"model": model, **options})

    def check(self) -> None:
        """Raises UserError for a value out of range, or values that exclude each other."""
        ranges: tuple[tuple[str, float, float], ...] = (
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
        self.inputs.check()
        self.selection.check(self.inputs)

    def to_json(self) -> dict[str, object]:
        """The options as config.json holds them: flat, in the order of exitwise 0.1.0."""
        found = to_json(self)
        order = [key for key in found if key != "images"]
        order.insert(order.index("limit") + 1, "images")
        return {key: found[key] for key in order}
