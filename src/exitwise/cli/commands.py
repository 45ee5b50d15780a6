"""The commands: one class a command, whose fields are its options."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from ..alignment.config import AlignConfig
from ..auditing.audit import audit
from ..auditing.config import AuditConfig
from ..judges import NAMES
from ..judges.config import Judging
from ..run import directory
from ..run.run import Run
from ..shipping.config import SlimConfig
from .console import Bar, print_answer, print_comparison, print_scores
from .reward import RewardCommand

DEMO_LIMIT = 48  # prompts of each kind, three a policy: fewer could not show that two exits are alike


class Runnable(Protocol):
    """A command with its options."""

    def run(self) -> None: ...


@dataclass(frozen=True)
class Audit:
    """Audit a vision-language model at the exits of its image encoder, and write a report.

    The same command again resumes a stopped audit.
    """

    config: tyro.conf.OmitArgPrefixes[AuditConfig]
    out: Path | None = None
    """Run directory; default: runs/<name of the model>."""
    costs: bool = True
    """Measure FLOPs, parameters and latency of each exit before the first answer (docs/explanation/costs.md)."""
    judging: tyro.conf.OmitArgPrefixes[Judging] = field(default_factory=Judging)

    def run(self) -> None:
        with Bar() as bar:
            run = audit(self.config, out=self.out, costs=self.costs, judging=self.judging, progress=bar)
        print_answer(run, run.path / "report.html")


@dataclass(frozen=True)
class Demo:
    """Audit the built-in VLM with built-in prompts and photographs; five to fifteen minutes on two cores."""

    out: Path | None = None
    """Run directory; default: runs/demo, or runs/demo-control with --control."""
    control: bool = False
    """Audit the negative control instead: the same VLM without the trained-in vulnerability."""

    def run(self) -> None:
        name = "testbed-control" if self.control else "testbed"
        out = self.out or Path("runs/demo-control" if self.control else "runs/demo")
        Audit(AuditConfig.of(name, limit=DEMO_LIMIT), out).run()


@dataclass(frozen=True)
class Align:
    """Train a LoRA adapter at the exits that the device will use: L-PPO, or GRPO, SFT, DPO on the same data.

    The same command again resumes a stopped training from its last checkpoint.
    """

    config: tyro.conf.OmitArgPrefixes[AlignConfig]
    out: Path | None = None
    """Run directory; default: runs/<name of the model>-<method>."""

    def run(self) -> None:
        from ..alignment.loop import align

        with Bar() as bar:
            adapter = align(self.config, out=self.out, progress=bar)
        print(f"adapter: {adapter.folder}")
        print(f"audit it: exitwise audit {self.config.model} --adapter {adapter.path}")


@dataclass(frozen=True)
class Judge:
    """Judge the answers of a finished run again, without its model; writes verdicts, metrics and the report.

    The same command again resumes a stopped judging.
    """

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Run directory of `exitwise audit`."""
    judge: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Names separated by commas, of {', '.join(NAMES)} (docs/reference/judges.md); the first one's "
            "verdicts make the figures. Without it, the run's."
        ),
    ] = None
    judging: tyro.conf.OmitArgPrefixes[Judging] = field(default_factory=Judging)

    def run(self) -> None:
        from ..auditing.judging import judge

        with Bar() as bar:
            run = judge(self.run_directory, self.judge, judging=self.judging, progress=bar)
        print_answer(run, run.path / "report.html")


@dataclass(frozen=True)
class ScoreCommand:
    """Score the answers of a finished run (toxicity, reward, VQA-v2 accuracy), without its model.

    The same command again resumes a stopped scoring. Prints every score figure of the run.
    """

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Run directory of `exitwise audit`."""
    scorer: str = ""
    """Scorers, separated by commas: perspective, detoxify, granite-guardian-hap, reward:<model>, vqa-v2, vqa-v2-always.
    Without any, only the figures of existing scores are computed."""
    model: str | None = None
    """Folder, file or hub id of the weights of detoxify or granite-guardian-hap."""
    batch_size: int | None = None
    """Answers in one forward pass, for scorers with weights."""
    base_url: str | None = None
    """Address of a server with the Perspective API. Default: Google's."""
    queries_per_second: float = 1.0
    """Rate limit of the Perspective API key."""
    template: str | None = None
    """Text format of a published reward model whose id is not known: human-assistant or question."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint; detoxify's weights are pickle files, which can contain code."""

    def run(self) -> None:
        from ..scorers import score

        with Bar() as bar:
            run = score(
                self.run_directory,
                self.scorer,
                model=self.model,
                batch_size=self.batch_size,
                base_url=self.base_url,
                queries_per_second=self.queries_per_second,
                template=self.template,
                trust_remote_code=self.trust_remote_code,
                progress=bar,
            )
        print_scores(run)


@dataclass(frozen=True)
class Report:
    """Write report.html of a finished run again, without its model."""

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Run directory of `exitwise audit`."""

    def run(self) -> None:
        from ..auditing.report import write_report

        with directory.edit_run(self.run_directory) as folder:
            run = Run.open(folder)
            print_answer(run, write_report(run))


@dataclass(frozen=True)
class Compare:
    """Compare two audits of the same questions, before and after alignment: differences with intervals and tests."""

    before: Annotated[Path, tyro.conf.Positional]
    """Run directory of the audit before alignment."""
    after: Annotated[Path, tyro.conf.Positional]
    """Run directory of the audit after alignment: same model, with an adapter, same options."""
    out: Path | None = None
    """Directory for compare.json, compare.md and compare.html; default: AFTER."""

    def run(self) -> None:
        from ..comparison import compare

        before, after = Run.open(self.before), Run.open(self.after)
        with nullcontext(self.out) if self.out else directory.edit_run(self.after) as folder:
            print_comparison(compare(before, after, out=folder))


@dataclass(frozen=True)
class Calibrate:
    """Calibrate a judge against human labels: sensitivity, specificity, agreement, and ASR corrected for its errors."""

    judge: Annotated[str, tyro.conf.Positional]
    """Name of a judge, or column:NAME for verdicts in a column of the labels file."""
    labels: Path
    """CSV or JSONL file: columns prompt, answer and human labels (human1, human2 ..., or human_majority; 1: unsafe)."""
    humans: tuple[str, ...] = ()
    """Names of the columns with human labels; default: human1, human2 ... or human_majority."""
    apply: Path | None = None
    """Run directory with verdicts of this judge: saves the calibration there; its report shows the corrected ASR."""
    out: Path | None = None
    """JSON file for the calibration without --apply; default: calibration.<judge>.json."""
    judging: tyro.conf.OmitArgPrefixes[Judging] = field(default_factory=Judging)

    def run(self) -> None:
        from ..auditing.report import write_report
        from ..measure.calibration import calibrate, lines

        path = Path(f"calibration.{self.judge.replace(':', '-')}.json")
        path = self.apply / path if self.apply else self.out or path
        out = self.out if self.apply else path
        run = Run.open(self.apply) if self.apply else None
        found = calibrate(self.judge, self.labels, humans=self.humans, apply=run, out=out, judging=self.judging)
        print("\n".join(lines(found)))
        if run:
            with directory.edit_run(run.path):
                write_report(run)
        print(f"calibration: {path}")


@dataclass(frozen=True)
class TableCommand:
    """Print the tables of the paper: bands (Table 2), curves (Figure 3), and an example."""

    run_directory: Annotated[Path, tyro.conf.Positional]
    """Run directory of `exitwise audit`."""
    after: Annotated[Path | None, tyro.conf.Positional] = None
    """Run directory of the same audit after alignment; its figures are printed after an arrow."""
    format: str = "md"
    """Format of the tables: md, latex or csv."""
    what: str = "all"
    """Which tables: bands, curves, examples, costs or all."""
    with_answers: bool = False
    """Print the answers of the example; they may be harmful."""
    toxicity: str | None = None
    """Scorer whose toxicity is printed, if the run has several."""
    reward: str | None = None
    """Scorer whose reward is printed, if the run has several."""

    def run(self) -> None:
        from ..report.paper import tables

        text = tables(
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
class Slim:
    """Write a checkpoint whose image encoder ends at an exit: stock transformers, vLLM and others load it."""

    config: tyro.conf.OmitArgPrefixes[SlimConfig]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the checkpoint; new or empty."""

    def run(self) -> None:
        from ..shipping.slim import slim

        with Bar() as bar:
            folder = slim(self.config, self.out, bar)
        saves = directory.read_json(folder / "exitwise.json", "saves")["saves"]
        print(
            f"{saves['blocks_cut']} blocks cut: {saves['parameters']:,} parameters, {saves['bytes']:,} bytes and "
            f"{saves['flops']:.3g} FLOPs per request less"
        )
        print(f"slim model: {folder}")


@dataclass(frozen=True)
class Inspect:
    """Print the exit at which a checkpoint runs in transformers, vLLM and llama.cpp, and warn where they differ."""

    path: Annotated[Path, tyro.conf.Positional]
    """Folder of a Hugging Face checkpoint, or a GGUF file (mmproj)."""

    def run(self) -> None:
        from ..shipping.runtimes import inspect_checkpoint, lines

        print("\n".join(lines(inspect_checkpoint(self.path))))


Command = (
    Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Align, tyro.conf.subcommand("align")]
    | Annotated[Judge, tyro.conf.subcommand("judge")]
    | Annotated[ScoreCommand, tyro.conf.subcommand("score")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[TableCommand, tyro.conf.subcommand("table")]
    | Annotated[Slim, tyro.conf.subcommand("slim")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[tyro.conf.OmitArgPrefixes[RewardCommand], tyro.conf.subcommand("reward")]
)
