"""The command line: one class a command. Errors are one line and exit code 2; `--debug` shows the traceback."""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..alignment.config import AlignConfig
from ..auditing.audit import audit, judge_and_measure
from ..auditing.config import AuditConfig
from ..errors import UserError
from ..judges import NAMES
from ..judges.config import Judging
from ..rewards.config import RewardConfig
from ..run import directory
from ..shipping.config import SlimConfig

EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_PIPE = 2, 130, 141
DEMO_LIMIT = 48  # prompts of each kind, three a policy: fewer could not show that two exits are alike


@dataclass(frozen=True)
class Audit:
    """Audit a vision-language model at the exits of its image encoder, and write a report.

    Started again with the same arguments, a stopped audit goes on where it was.
    """

    config: tyro.conf.OmitArgPrefixes[AuditConfig]
    out: Path | None = None
    """The run directory; without it, runs/<name of the model>."""
    costs: bool = True
    """Measure what each exit costs (FLOPs, seconds) before the first answer; docs/explanation/costs.md."""
    judging: tyro.conf.OmitArgPrefixes[Judging] = field(default_factory=Judging)

    def run(self) -> None:
        out = self.out or Path("runs") / Path(self.config.model).resolve().name
        with _Bar() as bar:
            report = audit(self.config, out, bar, self.judging, self.costs)
        _print_answer(out, report)


@dataclass(frozen=True)
class Demo:
    """Audit the built-in VLM with built-in prompts and photographs; five to fifteen minutes on two cores."""

    out: Path | None = None
    """The run directory; without it, runs/demo, or runs/demo-control with --control."""
    control: bool = False
    """Audit the negative control instead: the same VLM without the hole."""

    def run(self) -> None:
        name = "testbed-control" if self.control else "testbed"
        out = self.out or Path("runs/demo-control" if self.control else "runs/demo")
        Audit(AuditConfig.of(name, limit=DEMO_LIMIT), out).run()


@dataclass(frozen=True)
class Align:
    """Align a vision-language model at the exits it will use: L-PPO, or a baseline on the same footing.

    Started again with the same arguments, a stopped alignment goes on from its last checkpoint.
    """

    config: tyro.conf.OmitArgPrefixes[AlignConfig]
    out: Path | None = None
    """The run directory; without it, runs/<name of the model>-<method>."""

    def run(self) -> None:
        from ..alignment.loop import align

        name = f"{Path(self.config.model).resolve().name}-{self.config.method}"
        out = self.out or Path("runs") / name
        with _Bar() as bar:
            adapter = align(self.config, out, bar)
        print(f"adapter: {adapter}")
        print(f"audit it: exitwise audit {self.config.model} --adapter {out}")


@dataclass(frozen=True)
class Judge:
    """Judge the answers of an existing run again, without its model; writes verdicts, metrics and the report.

    Started again with the same arguments, a stopped judging goes on where it was.
    """

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Made by `exitwise audit`."""
    judge: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Names separated by commas, of {', '.join(NAMES)} (docs/reference/judges.md); the first one's "
            "verdicts make the figures. Without it, the run's."
        ),
    ] = None
    judging: tyro.conf.OmitArgPrefixes[Judging] = field(default_factory=Judging)

    def run(self) -> None:
        from ..measure.metrics import compute_metrics
        from ..report import write_report

        with directory.edit_run(self.run_directory) as folder:
            with _Bar() as bar:
                judge_and_measure(folder, compute_metrics, self.judge, self.judging, bar)
            _print_answer(folder, write_report(folder))


@dataclass(frozen=True)
class Score:
    """Give the answers of an existing run numbers (toxicity, reward, VQA-v2 accuracy), without its model.

    Started again with the same arguments, stopped scoring goes on where it was. Prints every figure that the run has.
    """

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Made by `exitwise audit`."""
    scorer: str = ""
    """perspective, detoxify, granite-guardian-hap, reward:<model>, vqa-v2, vqa-v2-always, separated by commas; without
    any, the figures of what is scored already."""
    model: str | None = None
    """Folder, file or hub id of the weights of detoxify or granite-guardian-hap."""
    batch_size: int | None = None
    """Answers in a forward pass, for scorers with weights."""
    base_url: str | None = None
    """Another server that speaks the Perspective API."""
    queries_per_second: float = 1.0
    """What the Perspective API key may ask."""
    template: str | None = None
    """How the reward model wants its texts, where that is not known."""
    trust_remote_code: bool = False
    """Load weights that can carry code (detoxify's pickle files)."""

    def run(self) -> None:
        from datetime import UTC, datetime

        from ..scorers import make_scorer, score_run

        names = list(dict.fromkeys(word.strip() for word in self.scorer.split(",") if word.strip()))
        if self.model is not None and len(names) != 1:
            raise UserError(f"--model belongs to one scorer, --scorer names {len(names)}; score with one at a time")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size got {self.batch_size}; expected at least 1")
        today = datetime.now(UTC).date().isoformat()
        with directory.edit_run(self.run_directory) as folder, _Bar() as bar:
            for name in names:
                scorer = make_scorer(
                    name,
                    model=self.model,
                    batch_size=self.batch_size,
                    base_url=self.base_url,
                    queries_per_second=self.queries_per_second,
                    template=self.template,
                    trust_remote_code=self.trust_remote_code,
                )
                if scorer.info.notice:
                    bar.say(scorer.info.notice)
                score_run(folder, scorer, today, bar)
            _print_scores(folder)


@dataclass(frozen=True)
class Report:
    """Write report.html of an existing run again, without its model."""

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Made by `exitwise audit`."""

    def run(self) -> None:
        from ..report import write_report

        with directory.edit_run(self.run_directory) as folder:
            _print_answer(folder, write_report(folder))


@dataclass(frozen=True)
class Compare:
    """Compare two audits of the same questions: of a model, and of that model after alignment."""

    before: Annotated[Path, tyro.conf.Positional]
    """Run directory of the model as it was."""
    after: Annotated[Path, tyro.conf.Positional]
    """Run directory of the same model with an adapter, audited with the same arguments."""
    out: Path | None = None
    """Where compare.json, compare.md and compare.html go; without it, the directory AFTER."""

    def run(self) -> None:
        from ..comparison import compare_runs

        with _writable(self.out) if self.out else directory.edit_run(self.after) as folder:
            _print_comparison(compare_runs(self.before, self.after, folder), folder)


@dataclass(frozen=True)
class Calibrate:
    """Hold a judge to labels of people: sensitivity, specificity, agreement, and ASR corrected for its errors."""

    judge: Annotated[str, tyro.conf.Positional]
    """A judge by its name, or column:NAME for verdicts that stand in the labels file."""
    labels: Path
    """CSV or JSONL: prompt, answer, and labels of people (human1, human2 ..., or human_majority), 1 for unsafe."""
    humans: tuple[str, ...] = ()
    """Columns of people, where they have unusual names."""
    apply: Path | None = None
    """A run directory that this judge judged: its report shows the corrected ASR from then on."""
    out: Path | None = None
    """Where the calibration goes without --apply; without it, calibration.<judge>.json."""
    judging: tyro.conf.OmitArgPrefixes[Judging] = field(default_factory=Judging)

    def run(self) -> None:
        from ..measure.calibration import apply, calibrate, lines
        from ..report import write_report

        if self.apply and self.out:
            raise UserError("got --apply and --out; --apply writes into the run, so leave --out away")
        found = calibrate(self.judge, self.labels, self.humans, self.judging)
        print("\n".join(lines(found)))
        if self.apply:
            with directory.edit_run(self.apply) as folder:
                path = apply(folder, found)
                write_report(folder)
        else:
            path = self.out or Path(f"calibration.{self.judge.replace(':', '-')}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            directory.write_json(path, found.to_json())
        print(f"calibration: {path}")


@dataclass(frozen=True)
class TableCommand:
    """Print the tables of the paper: bands (Table 2), curves (Figure 3), and an example."""

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Made by `exitwise audit`."""
    after: Annotated[Path | None, tyro.conf.Positional] = None
    """The same audit of the aligned model; its figures follow the arrows."""
    format: str = "md"
    """md, latex or csv."""
    what: str = "all"
    """bands, curves, examples, costs or all."""
    with_answers: bool = False
    """Show answers in the example. They may be harmful."""
    toxicity: str | None = None
    """Whose toxicity, where the run has several."""
    reward: str | None = None
    """Whose reward, where the run has several."""

    def run(self) -> None:
        from ..report.paper import make_tables

        text = make_tables(
            self.run_directory,
            self.after,
            what=self.what,
            format=self.format,
            with_answers=self.with_answers,
            toxicity=self.toxicity,
            reward=self.reward,
        )
        print(text, end="")


@dataclass(frozen=True)
class RewardTrain:
    """Train a reward model on preference pairs (HH-RLHF format, or rows with prompt, chosen, rejected).

    The same command again resumes a stopped training.
    """

    config: tyro.conf.OmitArgPrefixes[RewardConfig]
    out: Path | None = None
    """The run directory; without it, runs/reward-<name of the backbone>."""

    def run(self) -> None:
        from ..rewards.evaluation import table
        from ..rewards.training import train_reward

        out = self.out or Path("runs") / f"reward-{Path(self.config.backbone).resolve().name}"
        with _Bar() as bar:
            metrics = train_reward(self.config, out, bar)
        print(table(metrics))
        print(f"reward model: {out}")


@dataclass(frozen=True)
class RewardEval:
    """Evaluate a reward model on preference pairs: accuracy, margin and calibration, overall and by category."""

    reward: Annotated[str, tyro.conf.Positional]
    """builtin, a folder made by `exitwise reward train`, or the hub id of a published reward model."""
    pairs: tuple[str, ...]
    """Files of preference pairs, or hub data sets such as Anthropic/hh-rlhf:harmless-base/test."""
    template: str | None = None
    """Text format of a published reward model whose id is not known: human-assistant or question."""
    limit: int | None = None
    """Largest number of pairs read from each file."""
    out: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> None:
        from ..rewards.evaluation import evaluate_reward, table

        with _Bar() as bar:
            print(table(evaluate_reward(self.reward, self.pairs, self.template, self.limit, self.out, bar)))


@dataclass(frozen=True)
class Reward:
    """Train or evaluate a reward model, whose score reinforcement learning maximises."""

    command: (
        Annotated[RewardTrain, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[RewardEval, tyro.conf.subcommand("eval", prefix_name=False)]
    )

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Slim:
    """Write a checkpoint whose image encoder ends at an exit: stock transformers, vLLM and others load it."""

    config: tyro.conf.OmitArgPrefixes[SlimConfig]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write; it must be new or empty."""

    def run(self) -> None:
        from ..shipping.slim import slim

        with _Bar() as bar:
            folder = slim(self.config, self.out, bar)
        saves = directory.read_json(folder / "exitwise.json", "saves")["saves"]
        print(
            f"{saves['blocks_cut']} blocks cut: {saves['parameters']:,} parameters, {saves['bytes']:,} bytes and "
            f"{saves['flops']:.3g} FLOPs per request less"
        )
        print(f"slim model: {folder}")


@dataclass(frozen=True)
class Inspect:
    """Tell at which exit a checkpoint runs in transformers, vLLM and llama.cpp, and warn where that is elsewhere."""

    path: Annotated[Path, tyro.conf.Positional]
    """A Hugging Face folder, or a GGUF file (an mmproj)."""

    def run(self) -> None:
        from ..shipping.runtimes import inspect_checkpoint, lines

        print("\n".join(lines(inspect_checkpoint(self.path))))


Command = (
    Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Align, tyro.conf.subcommand("align")]
    | Annotated[Judge, tyro.conf.subcommand("judge")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[TableCommand, tyro.conf.subcommand("table")]
    | Annotated[Slim, tyro.conf.subcommand("slim")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[tyro.conf.OmitArgPrefixes[Reward], tyro.conf.subcommand("reward")]
)


class _Bar:
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
        self.done, self.total, self.told, self.what = 0, 0, 0, ""

    def __enter__(self) -> "_Bar":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)  # a path stays whole: it is copied

    def start(self, total: int, what: str = "answers") -> None:
        self.task, self.total, self.what = self.bar.add_task(what, total=total), total, what
        self.done, self.told = 0, 0

    def advance(self, done: int) -> None:
        self.bar.advance(self.task, done)
        self.done += done
        if not self.console.is_terminal and self.done * 10 // max(1, self.total) > self.told:
            self.told = self.done * 10 // self.total
            self.say(f"{self.what} {self.done}/{self.total}")


def _print_answer(folder: Path, report: Path) -> None:
    metrics = directory.read_json(folder / "metrics.json", "answer")
    print(metrics["answer"]["headline"])
    print(metrics["answer"]["detail"])
    from ..measure.calibration import in_words, of_run

    print(in_words(metrics["judge"], of_run(folder, metrics["judge"], 0)))
    notice = metrics.get("notice")
    if notice:
        print(notice)
    timing = folder / "timing.json"
    if timing.exists():
        phases = directory.read_json(timing, "phases")["phases"]
        print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items()))
    print(f"report: {report}")


@contextmanager
def _writable(folder: Path) -> Iterator[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the directory {folder} ({error.strerror}); choose another with --out") from None
    yield folder


def _print_comparison(figures: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from ..comparison.page import table
    from ..report.text import visible

    verdict, console = figures["verdict"], Console()
    failures = [f"{failure['name']}: {failure['text']}" for failure in verdict["failures"]]
    print(verdict["sentence"])
    for line in (*failures, *verdict["detail"], *figures["notes"]):
        print(f"- {visible(line)}")
    print()
    if console.is_terminal:
        console.print(table(figures, console.width))
    else:
        Console(width=10_000).print(table(figures, None))
    print(f"comparison: {folder / 'compare.html'}")


def _print_scores(folder: Path) -> None:
    from ..measure.scores import unfinished, write_score_metrics

    found = write_score_metrics(folder)
    for row in found["scores"]:
        where = f"{row['band']} band" if row["exit"] is None else f"exit {row['exit']}"
        print(f"{row['metric']:<7}{where:<12}{_figure(row)}  n {row['n']}, unscored {row['unscored']}  {row['scorer']}")
    for row in found["refusal_contrast"]:
        shares = [_share(row[name]) for name in ("refusal", "over_refusal")]
        print(f"exit {row['exit']}: refuses {shares[0]} of harmful and {shares[1]} of harmless requests")
    for name in unfinished(folder):
        print(f"not through yet, so in no figure: {name}")
    print(f"figures: {folder / 'score_metrics.json'}")


def _figure(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:.2f}{interval}"


def _share(value: float | None) -> str:
    return "none measured" if value is None else f"{100 * value:.0f} %"


def entry(arguments: Sequence[str] | None = None) -> None:
    """The `exitwise` command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words:
        words = ["--help"]
    try:
        parse(words).run()
    except BrokenPipeError:  # the reader had enough, as in `exitwise --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end raises again
        raise SystemExit(EXIT_PIPE) from None
    except UserError as error:
        if debug:
            raise
        _fail(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _fail("stopped; what was finished is kept, and the same command goes on from there", EXIT_STOPPED)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(
            f"cannot write: {error.strerror}{where}; make room or permit it, then give the same command again",
            EXIT_BAD_INPUT,
        )


def parse(words: Sequence[str]) -> Any:
    """The command that the words say, not yet run; SystemExit where they say none."""
    return tyro.cli(Command, args=words, prog="exitwise", description=__doc__)  # type: ignore[call-overload]


def _fail(message: str, code: int) -> None:
    print(f"exitwise: {message}", file=sys.stderr)
    raise SystemExit(code)
