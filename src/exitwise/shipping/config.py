"""Options of a slim checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..errors import UserError
from ..model.dtypes import SAVED_DTYPES


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
