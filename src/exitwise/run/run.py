"""`Run`: a run directory as an object. Each file is read once, when it is first asked for, and is typed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from . import directory
from .exit import Exit
from .figures import Answer, Metrics
from .records import Completion, Record, Sample, Score, Verdict
from .typed import Json, from_json, to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

RESTORE = "restore it or start a new run directory"


@dataclass(frozen=True)
class RunConfig:
    """What config.json says of the audit; `Run.options` has every key."""

    model: str
    judge: str
    seed: int
    adapter: str | None = None
    exits: str = "all"
    notice: str = ""


@dataclass(frozen=True)
class Plan:
    """plan.json: what was found out at the first start and must not change on resume."""

    exits: list[Exit]
    default_exit: Exit
    n_blocks: int
    n_requests: int
    batch_size: int
    prefix_tokens: int
    threads: int
    model_sha256: str
    skipped: dict[str, str]
    """Samples skipped because their prompt contains a control token, each with the reason."""


class Run:
    """A run directory of `exitwise audit`, read lazily; the files stay as they are.

    Attributes:
        path: the run directory.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        self.verdicts: Mapping[str, tuple[Verdict, ...]] = RecordFiles(self.path, "verdicts", Verdict)
        """By judge, in the order of `completions`."""
        self.scores: Mapping[str, tuple[Score, ...]] = RecordFiles(self.path, "scores", Score)
        """By the scorer's file name, such as `vqa-v2`."""
        self._objects: dict[str, dict[str, Json] | None] = {}

    @classmethod
    def open(cls, path: "str | PathLike[str] | Run") -> "Run":
        """The run in a directory; a `Run` is given back as it is.

        Raises:
            UserError: it is not a run directory of `exitwise audit`.
        """
        if isinstance(path, Run):
            return path
        if not Path(path, "config.json").is_file():
            raise UserError(f"{path} is not a run directory (no config.json); expected one made by `exitwise audit`")
        return cls(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # Files

    def read_object(self, name: str) -> dict[str, Json] | None:
        """A JSON object of the run by its file name, such as `costs.json`, read once; None where there is no file.

        Raises:
            UserError: the file is not a JSON object.
        """
        if name not in self._objects:
            path = self.path / name
            self._objects[name] = directory.read_json(path) if path.exists() else None
        return self._objects[name]

    def write_object(self, name: str, value: dict[str, Json]) -> None:
        """Writes a JSON file of the run, atomically; later reads see `value`."""
        directory.write_json(self.path / name, value)
        self._objects[name] = value

    def _object(self, name: str) -> dict[str, Json]:
        found = self.read_object(name)
        if found is None:
            raise UserError(f"{self.path / name} does not exist; expected a run directory made by `exitwise audit`")
        return found

    @property
    def options(self) -> dict[str, Json]:
        """All of config.json."""
        return self._object("config.json")

    @cached_property
    def config(self) -> RunConfig:
        """The audit's options that readers of a run need."""
        return from_json(self.options, RunConfig, self.path / "config.json", RESTORE)

    @cached_property
    def plan(self) -> Plan:
        """What was found out at the first start."""
        return from_json(self._object("plan.json"), Plan, self.path / "plan.json", RESTORE)

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """In the order of samples.jsonl."""
        return tuple(directory.read_records(self.path / "samples.jsonl", Sample))

    @cached_property
    def completions(self) -> tuple[Completion, ...]:
        """In the order of the plan; fewer than planned in an unfinished run."""
        return tuple(directory.read_records(self.path / "completions.jsonl", Completion))

    @cached_property
    def metrics(self) -> Metrics:
        """The figures of the run's first judge."""
        again = f"write it again with: exitwise judge {self.path}"
        return from_json(self._object("metrics.json"), Metrics, self.path / "metrics.json", again)

    @property
    def answer(self) -> Answer:
        """At which exit the device may stop."""
        return self.metrics.answer

    def finished(self) -> "Run":
        """This run, where every planned answer is there.

        Raises:
            UserError: answers are missing, or answer samples that samples.jsonl lacks.
        """
        n_done, n_planned = len(self.completions), self.plan.n_requests
        if n_done != n_planned:
            raise UserError(
                f"{self.path} holds {n_done} of {n_planned} answers; finish it with the command that began it"
            )
        strangers = sorted({c.sample for c in self.completions} - {s.id for s in self.samples})
        if strangers:
            raise UserError(
                f"{self.path}/completions.jsonl answers samples that samples.jsonl lacks (first: {strangers[0]}); "
                "restore it"
            )
        return self

    # What judging, scoring and measuring add

    def write_verdicts(self, judge: str, verdicts: Sequence[Verdict]) -> None:
        """Writes verdicts.<judge>.jsonl; `verdicts[judge]` is what was written."""
        directory.write_atomic(self.path / f"verdicts.{judge}.jsonl", directory.to_lines(verdicts))
        self.keep_verdicts(judge, verdicts)

    def keep_verdicts(self, judge: str, verdicts: Sequence[Verdict]) -> None:
        """Takes verdicts that are on disk already, so that the file is not parsed again."""
        self.verdicts.keep(judge, verdicts)  # type: ignore[attr-defined]

    def keep_scores(self, scorer: str, scores: Sequence[Score]) -> None:
        """Takes scores that are on disk already, so that the file is not parsed again."""
        self.scores.keep(scorer, scores)  # type: ignore[attr-defined]

    def write_metrics(self, metrics: Metrics) -> None:
        """Writes metrics.json; `metrics` is what was written."""
        self.write_object("metrics.json", to_json(metrics))
        self.__dict__["metrics"] = metrics

    # For notebooks

    def figures(self) -> "DataFrame":
        """One row an exit: every share with its interval and n, ready for plotting (run/frames.py)."""
        from .frames import figures_frame

        return figures_frame(self.metrics)

    def answers(self) -> "DataFrame":
        """One row an answer, with its prompt and the label of every judge (run/frames.py). Answers may be harmful."""
        from .frames import answers_frame

        return answers_frame(self.samples, self.completions, self.verdicts, self.metrics.judge)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """ASR with its interval, utility and over-refusal by exit: the report's first curve, drawn by matplotlib.

        Args:
            axes: draws there; without it, on axes of a new figure.

        Raises:
            UserError: matplotlib is not installed.
        """
        from .plot import plot_exits

        return plot_exits(self.metrics, axes)

    def _repr_html_(self) -> str:
        from .frames import summary_html

        if self.read_object("metrics.json") is None:
            return f"<p>{escape(repr(self))}: not measured yet</p>"
        return summary_html(self.answer, self.figures())


class RecordFiles(Mapping[str, tuple]):
    """The files <kind>.<name>.jsonl of a folder as a mapping from name to records; each file is read once."""

    def __init__(self, folder: Path, kind: str, record: type[Record]):
        self.folder, self.kind, self.record = folder, kind, record
        self._read: dict[str, tuple[Record, ...]] = {}

    def __getitem__(self, name: str) -> tuple[Record, ...]:
        if name not in self._read:
            path = self.folder / f"{self.kind}.{name}.jsonl"
            if not path.is_file():
                raise KeyError(name)
            self._read[name] = tuple(directory.read_records(path, self.record))
        return self._read[name]

    def keep(self, name: str, records: Sequence[Record]) -> None:
        """Takes what is on disk already."""
        self._read[name] = tuple(records)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(p.name[len(self.kind) + 1 : -6] for p in self.folder.glob(f"{self.kind}.*.jsonl")))

    def __len__(self) -> int:
        return sum(1 for _ in self)
