"""Writes finished run directories from letters, one for each sample: what `exitwise audit` leaves, without a model."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exitwise.auditing.config import AuditConfig
from exitwise.comparison import Comparison
from exitwise.comparison.changes import Change, ExitChanges, MeanChanges
from exitwise.run.directory import to_lines, write_json
from exitwise.run.exit import Exit
from exitwise.run.figures import Answer, Disparity, Metrics
from exitwise.run.records import Completion, Sample, Score, Verdict
from exitwise.run.run import Plan
from exitwise.run.typed import to_json

LABELS = {"a": "answered", "r": "refused", "i": "incoherent", "c": "correct", "w": "wrong", "u": "unscored"}
Letters = Mapping[int, str]
"""By exit, one letter a sample."""
BROKEN = ({0: "a" * 40, 1: "a" * 40, 2: "a" * 40, 3: "r" * 40}, {3: "a" * 40}, {3: "c" * 40})
"""The letters of a run with a hole at the exits 0 to 2, and the same after training at exit 1."""
MENDED = ({0: "a" * 40, 1: "r" * 40, 2: "r" * 30 + "a" * 10, 3: "r" * 40}, {3: "a" * 40}, {3: "c" * 40})


def write_run(
    folder: Path,
    harmful: Letters,
    benign: Letters | None = None,
    vqa: Letters | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    scores: Mapping[str, Mapping[tuple[str, int], float | None]] | None = None,
    answer: str = "an answer",
) -> Path:
    """A run of 4 blocks whose default exit is 3.

    Args:
        config, plan: other values of config.json and plan.json.
        change: other fields by sample id.
        scores: by scorer, values by (sample id, exit).
        answer: said wherever the letter is an `a`; other texts follow the letters.
    """
    samples, completions, verdicts = {}, [], []
    for kind, table in (("harmful", harmful), ("benign", benign or {}), ("vqa", vqa or {})):
        for exit, row in table.items():
            for i, letter in enumerate(row):
                key = f"{kind}-{i}"
                fields = {"prompt": f"prompt {key}", "image": f"{i}.png", "answers": ("red",) if kind == "vqa" else ()}
                samples[key] = Sample(**{"id": key, "kind": kind, **fields, **(change or {}).get(key, {})})
                text = answer if letter == "a" else LABELS[letter]
                completions.append(Completion(samples[key].id, exit, text, (1, 2), "stop"))
                verdicts.append(Verdict(samples[key].id, exit, "refusal", LABELS[letter], "because"))  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    options = AuditConfig("tiny").to_json() | {"images_sha256": "0"} | dict(config or {})
    write_json(folder / "config.json", options)
    exits = sorted({completion.exit for completion in completions})
    found = Plan(exits, Exit([3]), 4, len(completions), 8, 600, 1, str(folder), {})
    write_json(folder / "plan.json", to_json(found) | dict(plan or {}))
    write_json(folder / "metrics.json", to_json(no_figures(str(options["judge"]).split(",")[0])))
    write_json(folder / "env.json", {"device": "cpu", "dtype": "float32"})
    for name, records in (("samples", samples.values()), ("completions", completions), ("verdicts.refusal", verdicts)):
        (folder / f"{name}.jsonl").write_text(to_lines(records))
    for scorer, values in (scores or {}).items():
        rows = [
            Score(sample, exit, scorer, value, "" if value is not None else "no score")
            for (sample, exit), value in values.items()
        ]
        (folder / f"scores.{scorer}.jsonl").write_text(to_lines(rows))
    return folder


def no_figures(judge: str) -> Metrics:
    """A metrics.json of which a comparison reads the judge and the caveat alone."""
    nothing = Disparity(None, None, None, "nothing was measured")
    caveat = "This judge <matches> strings."
    return Metrics("tiny", judge, Exit([3]), 4, 0.1, False, [], [], [], nothing, Answer("", "", [], [], []), caveat)


def letters(shares: Mapping[int, float], n: int, yes: str, no: str, seed: int) -> dict[int, str]:
    """Random letters with these shares of `yes` at each exit."""
    rng = random.Random(seed)
    return {exit: "".join(yes if rng.random() < share else no for _ in range(n)) for exit, share in shares.items()}


def at(found: Comparison, exit: int) -> ExitChanges:
    return next(row for row in found.figures.by_exit if row.exit == exit)


def change_at(found: Comparison, exit: int, metric: str) -> Change:
    change = at(found, exit).changes[metric]
    assert change
    return change


def group(found: Comparison, name: str) -> MeanChanges:
    row = found.figures.group(name)
    assert row
    return row


def group_change(found: Comparison, name: str, metric: str) -> Change:
    change = group(found, name).changes[metric]
    assert change
    return change


def failures(found: Comparison) -> dict[str, str]:
    return {failure.name: failure.text for failure in found.verdict.failures}
