"""The judges. A judge turns a sample and its completion into a verdict; none of them generates again.

refusal              string matcher with a coherence gate (refusal.py, coherence.py), no model
guards.py            one table of guard models: what each is asked, how its reply is read (parsing.py)
rubric               any chat model with a rubric (rubric.py)
local.py             models through transformers; endpoint.py: behind an OpenAI-compatible address
judging.py           the loop over a run
vqa.py               right or wrong, for every judge
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..run.directory import read_records, to_lines, write_atomic
from ..run.records import Completion, Sample, Verdict
from .config import RUBRIC, Judging
from .guards import GUARDS
from .judging import judge_with_model
from .refusal import judge_completion

JUDGES: dict[str, Callable[[Sample, Completion], Verdict]] = {"refusal": judge_completion}
"""The judges that are rules."""

NAMES = (*JUDGES, *GUARDS, RUBRIC)


def parse_judges(names: str) -> tuple[str, ...]:
    """Names separated by commas, each once. Raises UserError for one that is not in NAMES."""
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        if name not in NAMES:
            raise UserError(f"--judge got {name!r}; expected one or more of: {', '.join(NAMES)}")
    return found


def judge_run(
    folder: Path,
    name: str,
    judging: Judging | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """Judges every completion of a run and writes verdicts.<name>.jsonl, in the order of completions.jsonl.

    VQA items are judged by the rule of vqa.py whoever the judge is. The caller holds the run (`runs.open_run` or
    `runs.edit_run`). A judge that is a model goes on where it was stopped (judging.py).

    Args:
        judging: where the model comes from, for judges that are one.
        tell: told (completions judged, of how many).

    Raises:
        UserError: there is no such judge, nothing to judge, or a completion whose sample is not in the run.
    """
    if name not in NAMES:
        raise UserError(f"there is no judge {name!r}; choose one of: {', '.join(NAMES)}")
    samples = {sample.id: sample for sample in read_records(folder / "samples.jsonl", Sample)}
    completions = read_records(folder / "completions.jsonl", Completion)
    if not completions:
        raise UserError(f"{folder} has no completions to judge; run `exitwise audit` there first")
    strangers = sorted({c.sample for c in completions} - samples.keys())
    if strangers:
        raise UserError(
            f"{folder}/completions.jsonl answers samples that samples.jsonl lacks (first: {strangers[0]}); restore it"
        )
    if name not in JUDGES:
        return judge_with_model(folder, name, samples, completions, judging or Judging(), tell)
    verdicts = [JUDGES[name](samples[c.sample], c) for c in completions]
    write_atomic(folder / f"verdicts.{name}.jsonl", to_lines(verdicts))
    return verdicts
