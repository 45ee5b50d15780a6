"""Options of a slim checkpoint."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

from tyro.conf import Positional

from ..data.options import make_config
from ..errors import UserError
from ..model.dtypes import SAVED_DTYPES
from ..run.exit import Exit


@dataclass(frozen=True)
class SlimConfig:
    """Model, exit and adapter of a slim checkpoint, and how it is written."""

    model: Positional[str]
    """testbed, testbed-control, a folder or a hub id of a model of a supported family."""
    exit: int
    """Exit to cut at: the number of encoder blocks that are kept."""
    adapter: str | None = None
    """PEFT adapter to merge: a folder, a hub id, or the run directory of `exitwise align`."""
    audit: Path | None = None
    """Run directory of an audit of this model with this adapter; its figures go into the model card."""
    check: bool = False
    """Load the result with transformers and compare logits and greedy tokens with the full model at the exit; the
    folder is deleted if they differ."""
    dtype: str = "auto"
    """Data type of the saved weights: float32, bfloat16, float16; auto is that of the source."""
    device: str = "auto"
    """Device to run the model on: cpu, cuda, cuda:1 ..., or auto (the first GPU, else the CPU)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    @classmethod
    def of(cls, model: str | PathLike[str], **options: object) -> Self:
        """A config from keywords.

        Raises:
            UserError: an unknown option, a value of another type, no exit, or a set of layers.
        """
        exit = options.get("exit")
        if isinstance(exit, Exit) and exit.is_set:
            raise UserError(f"exit got {exit}; expected the number of encoder blocks that are kept")
        number = int(exit) if isinstance(exit, Exit) else exit
        config = make_config(cls, {"model": model, **options, "exit": -1 if number is None else number})
        if exit is None:
            raise UserError("exit is missing; expected the number of encoder blocks that are kept, such as exit=8")
        return config

    def check_values(self) -> None:
        """Raises UserError for a value out of range; whether the exit exists is known once the model is loaded."""
        if self.exit < 0:
            raise UserError(f"--exit got {self.exit}; expected the number of encoder blocks that are kept, 1 or more")
        if self.dtype not in SAVED_DTYPES:
            raise UserError(f"--dtype got {self.dtype!r}; expected one of: {', '.join(SAVED_DTYPES)}")
