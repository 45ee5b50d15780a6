"""An adapter that an alignment trained: its folder, its options, and the metrics of its training."""

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..data.options import option_types
from ..errors import UserError
from ..run import directory
from ..run.exit import Exit
from .config import AlignConfig
from .records import StepRecord

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Adapter:
    """A finished alignment. Wherever an adapter's path is expected (`audit`, `slim`, `load_vlm`), this object can be
    given instead."""

    path: Path
    """The run directory."""

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Self:
        """The adapter of a run directory of `align`.

        Raises:
            UserError: it is not the run directory of an alignment, or the alignment is not finished.
        """
        adapter = cls(Path(path))
        if not (adapter.path / "metrics.jsonl").exists():
            raise UserError(f"{path} is not the run directory of an alignment; expected one made by `exitwise align`")
        if not (adapter.folder / "exitwise.json").exists():
            raise UserError(f"{path} has no finished adapter; finish the alignment with the command that began it")
        return adapter

    @property
    def folder(self) -> Path:
        """The plain PEFT adapter, which other libraries load too."""
        return self.path / "adapter"

    @cached_property
    def config(self) -> AlignConfig:
        """The options that it was trained with."""
        fields = directory.read_json(self.path / "config.json", "model", "method", "steps")
        return AlignConfig.of(**{name: fields[name] for name in option_types(AlignConfig) if name in fields})

    @cached_property
    def exits(self) -> tuple[Exit, ...]:
        """The exits that it was trained at."""
        about = directory.read_json(self.folder / "exitwise.json", "exits")
        return tuple(Exit.of(exit) for exit in about["exits"])

    def history(self) -> "DataFrame":
        """metrics.jsonl as a DataFrame: one row per step, indexed by `step`, one column per metric, and `signatures`.

        A metric that a step did not measure is NaN.
        """
        from pandas import DataFrame

        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [StepRecord.from_json(line) for line in lines]
        frame = DataFrame([record.metrics for record in records], dtype=float).astype({"step": int})
        frame["signatures"] = [record.signatures for record in records]
        return frame.set_index("step")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        trained, config = ",".join(map(str, self.exits)), self.config
        return f"Adapter({str(self.path)!r}: {config.model}, {config.method} at exits {trained}, {config.steps} steps)"
