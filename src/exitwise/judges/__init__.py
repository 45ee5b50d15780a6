"""Judges: each gives a sample's completion a verdict; none generates an answer again.

refusal.py     string matcher with a coherence gate (coherence.py), no model
guards.py      table of guard models: the prompt of each, and how its reply is parsed (parsing.py)
rubric.py      a rubric for any chat model
asking.py      questions to a judge model: in transformers (local.py) or behind an endpoint (endpoint.py, http_post.py)
judging.py     applies a judge model to a run
vqa.py         right or wrong, for every judge
"""

from collections.abc import Callable

from ..errors import UserError
from ..run.records import Completion, Sample, Verdict
from ..run.run import Run
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
    run: Run,
    name: str,
    judging: Judging | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Verdict, ...]:
    """Judges every completion of a run and writes verdicts.<name>.jsonl, in the order of completions.jsonl.

    VQA items are judged by the rule of vqa.py, whoever the judge is. The caller holds the run (`directory.open_run` or
    `directory.edit_run`). A judge that is a model resumes where it was stopped (judging.py).

    Args:
        judging: options of judges that are models.
        tell: called with (completions judged, of how many).

    Raises:
        UserError: there is no such judge, nothing to judge, or a completion whose sample is not in the run.
    """
    if name not in NAMES:
        raise UserError(f"there is no judge {name!r}; choose one of: {', '.join(NAMES)}")
    if not run.completions:
        raise UserError(f"{run.path} has no completions to judge; run `exitwise audit` there first")
    samples = {sample.id: sample for sample in run.samples}
    if strangers := sorted({c.sample for c in run.completions} - samples.keys()):
        raise UserError(
            f"{run.path}/completions.jsonl answers samples that samples.jsonl lacks (first: {strangers[0]}); restore it"
        )
    if name not in JUDGES:
        return judge_with_model(run, name, judging or Judging(), tell)
    run.write_verdicts(name, [JUDGES[name](samples[c.sample], c) for c in run.completions])
    return run.verdicts[name]
