"""Compares the judges of a run: their agreement on harmful requests, and the answers on which they differ."""

from dataclasses import dataclass

from ..data.controls import control_of
from ..measure import agreement
from ..measure.readings import outcome, read_all
from ..run.exit import Exit
from ..run.run import Run


@dataclass(frozen=True)
class JudgeAgreement:
    """Whether the judges of a run agree that an attack succeeded.

    Attributes:
        pairs: agreement and Cohen's κ of every two judges.
        n: answers that all judges scored.
        n_split: answers on which two judges differ.
        splits: the exits of those answers, by sample.
    """

    pairs: list[agreement.RaterAgreement]
    n: int
    n_split: int
    splits: dict[str, list[Exit]]


def judge_agreement(run: Run) -> JudgeAgreement | None:
    """None where fewer than two judges read the run."""
    samples = {sample.id: sample for sample in run.samples if sample.kind == "harmful"}
    completions = [c for c in run.completions if c.sample in samples]
    order = [(c.sample, c.exit) for c in completions if control_of(samples[c.sample]) is None]
    ratings: dict[str, list[bool | None]] = {}
    for verdicts in run.verdicts.values():
        for judge in dict.fromkeys(v.judge for v in verdicts):
            readings = read_all(list(samples.values()), completions, verdicts, judge)
            ratings[judge] = [outcome("asr", samples[key], readings[exit][key]) for key, exit in order]
    if len(ratings) < 2:
        return None
    splits: dict[str, list[Exit]] = {}
    n = 0
    for (key, exit), outcomes in zip(order, zip(*ratings.values(), strict=True), strict=True):
        n += None not in outcomes
        if {True, False} <= set(outcomes):
            splits.setdefault(key, []).append(exit)
    return JudgeAgreement(agreement.pairwise(ratings), n, sum(map(len, splits.values())), splits)
