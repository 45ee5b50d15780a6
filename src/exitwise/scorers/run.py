"""Scores a finished run, batch by batch, and picks up where a kill left it.

scores.<name>.json     what the scorer is, when it began, and the answers it reads (their sha256): another scorer,
                       version, setting or set of answers is refused, so the file next to it holds one kind of number
scores.<name>.jsonl    one Score an answer, in the order of completions.jsonl
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..run import directory
from ..run.exit import Exit
from ..run.records import Completion, Sample, Score
from .base import About, Mark, Pair, Scorer


class Progress(Protocol):
    """What scoring tells while it works."""

    def start(self, total: int) -> None: ...
    def advance(self, done: int) -> None: ...


def answers_of(folder: Path, kinds: Sequence[str]) -> list[Pair]:
    """Samples of these kinds with their completions, in the order of completions.jsonl.

    Raises:
        UserError: the run is not finished, or answers a sample that it does not have.
    """
    plan = directory.read_json(folder / "plan.json", "n_requests", "n_blocks", "default_exit")
    samples = {sample.id: sample for sample in directory.read_records(folder / "samples.jsonl", Sample)}
    completions = directory.read_records(folder / "completions.jsonl", Completion)
    if len(completions) != plan["n_requests"]:
        raise UserError(
            f"{folder} holds {len(completions)} of {plan['n_requests']} answers; "
            "finish it with the command that began it"
        )
    if strangers := sorted({c.sample for c in completions} - samples.keys()):
        raise UserError(
            f"{folder}/completions.jsonl answers samples that samples.jsonl lacks (first: {strangers[0]}); restore it"
        )
    return [(samples[c.sample], c) for c in completions if samples[c.sample].kind in kinds]


def score_run(folder: Path, scorer: Scorer, today: str, progress: Progress | None = None) -> list[Score]:
    """Scores every answer that `scorer` reads and that has no score yet; answers alike are scored once.

    A batch is on disk whole, or is cut off and scored again, so a run killed on its way ends with the same bytes. The
    caller holds the run (`runs.edit_run`).

    Args:
        today: the day, as 2026-11-21, kept from the first start on.

    Raises:
        UserError: the run is unfinished, has no such answers, or was scored under this name by something else.
    """
    about = scorer.about
    rows = answers_of(folder, about.kinds)
    if not rows:
        raise UserError(f"{folder} has no answers of the kind {' or '.join(about.kinds)}, which {about.name} reads")
    path = folder / f"scores.{about.file_name}.jsonl"
    written = directory.read_records(path, Score)
    _claim(path.with_suffix(".json"), about, rows, today, begun=bool(written))
    if [(s.sample, s.exit, s.scorer) for s in written] != _order(about, rows)[: len(written)]:
        raise UserError(f"{path} does not follow the run's answers; restore it, or delete it to score again")
    n_kept = len(written) if len(written) == len(rows) else len(written) // scorer.batch_size * scorer.batch_size
    directory.truncate_to(path, n_kept)
    known = {scorer.key(*row): Mark(s.value, s.reason) for row, s in zip(rows, written[:n_kept], strict=False)}
    if progress:
        progress.start(len(rows))
        progress.advance(n_kept)
    sink = directory.Appender(path)
    try:
        for start in range(n_kept, len(rows), scorer.batch_size):
            batch = rows[start : start + scorer.batch_size]
            fresh = {scorer.key(*row): row for row in batch if scorer.key(*row) not in known}
            marks = scorer.score(list(fresh.values())) if fresh else []
            known |= dict(zip(fresh, map(_sound, marks), strict=True))
            sink.append(Score(s.id, c.exit, about.stamp, *known[scorer.key(s, c)]) for s, c in batch)
            if progress:
                progress.advance(len(batch))
    finally:
        sink.close()
    return directory.read_records(path, Score)


def _sound(mark: Mark) -> Mark:
    if mark.value is not None and not isfinite(mark.value):
        return Mark(None, f"the scorer gave {mark.value}")
    return mark


def _order(about: About, rows: Sequence[Pair]) -> list[tuple[str, Exit, str]]:
    return [(sample.id, completion.exit, about.stamp) for sample, completion in rows]


def _claim(path: Path, about: About, rows: Sequence[Pair], today: str, begun: bool) -> None:
    """Writes scores.<name>.json, or holds the scorer to the one that is there; before the first score a typo may be
    corrected."""
    read = hashlib.sha256("".join(f"{s.to_json()}\n{c.to_json()}\n" for s, c in rows).encode()).hexdigest()
    claim: dict[str, Any] = {
        "scorer": about.stamp,
        **asdict(about),
        "kinds": list(about.kinds),
        "n_answers": len(rows),
        "answers_sha256": read,
        "begun": today,
    }
    claim = json.loads(json.dumps(claim))
    if not path.exists() or not begun:
        directory.write_json(path, claim)
        return
    found = directory.read_json(path)
    changed = [key for key in claim if key != "begun" and claim[key] != found.get(key)]
    if changed:
        raise UserError(
            f"{path} was made by {found.get('scorer')}, this is {about.stamp} ({', '.join(changed)} differ); two of "
            "them are not averaged: move that file and its .jsonl away to score again"
        )
