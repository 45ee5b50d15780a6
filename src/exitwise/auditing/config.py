"""What an audit can be asked. The command line is made from this class (tyro), and config.json holds its fields."""

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
    """What an audit asks; every field lands in config.json."""

    model: Positional[str]
    """testbed, testbed-control, a folder or a hub id of a model of a supported family (docs/reference/families.md)."""
    adapter: str | None = None
    """A PEFT adapter for the language model: a folder, a hub id, or the run directory of `exitwise align`."""
    exits: str = "all"
    """all, default, early, middle, late, numbers and ranges, separated by commas: default,0-3,late.
    Layers joined by + are one exit that fuses them: 3+18+23."""
    inputs: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    selection: OmitArgPrefixes[SelectionConfig] = field(default_factory=SelectionConfig)
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
        """The options as config.json holds them: flat, and in the order that it has always had."""
        found = to_json(self)
        order = [key for key in found if key != "images"]
        order.insert(order.index("limit") + 1, "images")
        return {key: found[key] for key in order}
