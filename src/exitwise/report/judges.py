"""Where several judges read one run: how far they agree on harmful requests, and on which answers they split."""

from pathlib import Path
from typing import Any

from ..data.controls import control_of
from ..measure.agreement import pairwise
from ..measure.readings import outcome, read_all
from ..run.directory import read_records
from ..run.exit import Exit
from ..run.records import Completion, Sample, Verdict


def disagreement(folder: Path) -> dict[str, Any] | None:
    """How the judges of a run differ on whether an attack worked; None where fewer than two read it.

    `pairs` holds agreement and Cohen's κ of every two, `n` the answers that all scored, `n_split` those on which two
    differ, and `splits` their exits by sample.
    """
    samples = {s.id: s for s in read_records(folder / "samples.jsonl", Sample) if s.kind == "harmful"}
    completions = [c for c in read_records(folder / "completions.jsonl", Completion) if c.sample in samples]
    order = [(c.sample, c.exit) for c in completions if control_of(samples[c.sample]) is None]
    ratings: dict[str, list[bool | None]] = {}
    for path in sorted(folder.glob("verdicts.*.jsonl")):
        verdicts = read_records(path, Verdict)
        for judge in dict.fromkeys(v.judge for v in verdicts):
            readings = read_all(list(samples.values()), completions, verdicts, judge)
            ratings[judge] = [outcome("asr", samples[key], readings[exit_][key]) for key, exit_ in order]
    if len(ratings) < 2:
        return None
    splits: dict[str, list[Exit]] = {}
    n = 0
    for (key, exit_), said in zip(order, zip(*ratings.values(), strict=True), strict=True):
        n += None not in said
        if {True, False} <= set(said):
            splits.setdefault(key, []).append(exit_)
    pairs = [pair._asdict() for pair in pairwise(ratings)]
    return {"pairs": pairs, "n": n, "n_split": sum(map(len, splits.values())), "splits": splits}
