"""Judges the answers of a run, and computes its figures and its report from the verdicts."""

from collections.abc import Callable
from os import PathLike

from ..data.options import make_config
from ..errors import UserError
from ..judges import judge_run, parse_judges
from ..judges.config import Judging
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.run import Run


def judge(
    run: Run | str | PathLike[str],
    judge: str | None = None,
    *,
    judging: Judging | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Run:
    """Judges the answers of a run again, without its model; `exitwise judge`. A stopped judging is resumed.

    Writes the verdicts of each judge, metrics.json and report.html from the first one's.

    Args:
        judge: names separated by commas, such as "refusal,llama-guard-3-8b"; without it, the judges of the audit.
        judging: options of judges that are models.
        options: the options of `Judging` as keywords, instead of `judging`.

    Raises:
        UserError: the run is unfinished, or there is no such judge, or it cannot be loaded.
    """
    from .report import write_report

    if judging is not None and options:
        raise UserError("got judging and options of judges as keywords; give one of the two")
    run = Run.open(run)
    with directory.edit_run(run.path):
        judge_and_measure(run, judge, judging or make_config(Judging, options), progress)
        write_report(run)
    return run


def judge_and_measure(
    run: Run, judges: str | None = None, judging: Judging | None = None, progress: Progress | None = None
) -> None:
    """Writes verdicts.<judge>.jsonl of each judge, and metrics.json from the first one's; the caller holds the run.

    Args:
        judges: names separated by commas; without them, the judges of the audit.
    """
    from ..measure.metrics import measure

    run.finished()
    names = parse_judges(judges or run.config.judge)
    for name in names:
        judge_run(run, name, judging, _reporter(name, progress or Silent()))
    measure(run, names[0])


def _reporter(name: str, progress: Progress) -> Callable[[int, int], None]:
    """Prints the number of verdicts after every tenth of them."""
    tenths = 0

    def report(done: int, total: int) -> None:
        nonlocal tenths
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            progress.say(f"{name}: {done}/{total} verdicts")

    return report
