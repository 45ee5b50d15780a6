"""What the command line prints: progress, and the lines at the end of a command."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.run import Run

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..measure.scores import ScoreFigures


class Bar:
    """A progress bar with what is left; plain lines where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = Console(stderr=True)
        self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self.task: Any = None
        self.done, self.total, self.reported, self.what = 0, 0, 0, ""

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)  # a path stays whole: it is copied

    def start(self, total: int, what: str = "answers") -> None:
        self.task, self.total, self.what = self.bar.add_task(what, total=total), total, what
        self.done, self.reported = 0, 0

    def advance(self, done: int) -> None:
        self.bar.advance(self.task, done)
        self.done += done
        if not self.console.is_terminal and self.done * 10 // max(1, self.total) > self.reported:
            self.reported = self.done * 10 // self.total
            self.say(f"{self.what} {self.done}/{self.total}")


def print_answer(run: Run, report: Path) -> None:
    from ..measure.calibration import find_calibration, in_words

    print(run.answer.headline)
    print(run.answer.detail)
    print(in_words(run.metrics.judge, find_calibration(run, run.metrics.judge)))
    if run.metrics.notice:
        print(run.metrics.notice)
    phases = (run.read_object("timing.json") or {}).get("phases")
    if isinstance(phases, dict):
        print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items()))
    print(f"report: {report}")


def print_comparison(found: "Comparison") -> None:
    from rich.console import Console

    from ..comparison.page import table
    from ..report.text import visible

    verdict, console = found.verdict, Console()
    failures = [f"{failure.name}: {failure.text}" for failure in verdict.failures]
    print(verdict.sentence)
    for line in (*failures, *verdict.detail, *found.figures.notes):
        print(f"- {visible(line)}")
    print()
    if console.is_terminal:
        console.print(table(found.figures, console.width))
    else:
        Console(width=10_000).print(table(found.figures, None))
    print(f"comparison: {found.path}")


def print_scores(run: Run) -> None:
    from ..measure.scores import read_score_metrics, unfinished

    found = read_score_metrics(run)
    for row in found.scores:
        where = f"{row.band} band" if row.exit is None else f"exit {row.exit}"
        print(f"{row.metric:<7}{where:<12}{_figure(row)}  n {row.n}, unscored {row.unscored}  {row.scorer}")
    for contrast in found.refusal_contrast:
        refusal, over_refusal = _share(contrast.refusal), _share(contrast.over_refusal)
        print(f"exit {contrast.exit}: refuses {refusal} of harmful and {over_refusal} of harmless requests")
    for name in unfinished(run):
        print(f"unfinished, so left out of the figures: {name}")
    print(f"figures: {run.path / 'score_metrics.json'}")


def _figure(row: "ScoreFigures") -> str:
    if row.value is None:
        return "not measured"
    interval = "" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
    return f"{row.value:.2f}{interval}"


def _share(value: float | None) -> str:
    return "none measured" if value is None else f"{100 * value:.0f} %"
