"""Scores a finished run, batch by batch, and resumes after a kill.

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

from ..errors import UserError
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.records import Completion, Sample, Score
from .base import ScoredAnswer, Scorer, ScorerInfo, ScorerInput


def answers_of(folder: Path, kinds: Sequence[str]) -> list[ScorerInput]:
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
    """Scores every answer that `scorer` reads and that has no score yet; equal answers are scored once.

    A batch is on disk whole, or is cut off and scored again, so a run killed at any moment ends with the same bytes.
    The caller holds the run (`directory.edit_run`).

    Args:
        today: the day, as 2026-11-21, kept from the first start on.

    Raises:
        UserError: the run is unfinished, has no such answers, or was scored under this name by something else.
    """
    info = scorer.info
    inputs = answers_of(folder, info.kinds)
    if not inputs:
        raise UserError(f"{folder} has no answers of the kind {' or '.join(info.kinds)}, which {info.name} reads")
    path = folder / f"scores.{info.file_name}.jsonl"
    written = directory.read_records(path, Score)
    _claim(path.with_suffix(".json"), info, inputs, today, begun=bool(written))
    order = [(sample.id, completion.exit, info.stamp) for sample, completion in inputs]
    if [(s.sample, s.exit, s.scorer) for s in written] != order[: len(written)]:
        raise UserError(f"{path} does not follow the run's answers; restore it, or delete it to score again")
    size = scorer.batch_size
    n_kept = len(written) if len(written) == len(inputs) else len(written) // size * size
    directory.truncate_to(path, n_kept)
    scores = written[:n_kept]
    known = {scorer.key(*one): ScoredAnswer(s.value, s.reason) for one, s in zip(inputs, scores, strict=False)}
    progress = progress or Silent()
    progress.start(len(inputs))
    progress.advance(n_kept)
    sink = directory.Appender(path)
    try:
        for start in range(n_kept, len(inputs), size):
            batch = inputs[start : start + size]
            new = {scorer.key(*one): one for one in batch if scorer.key(*one) not in known}
            results = scorer.score(list(new.values())) if new else []
            known |= dict(zip(new, map(_finite, results), strict=True))
            fresh = [Score(s.id, c.exit, info.stamp, *known[scorer.key(s, c)]) for s, c in batch]
            sink.append(fresh)
            scores += fresh
            progress.advance(len(batch))
    finally:
        sink.close()
    return scores


def _finite(result: ScoredAnswer) -> ScoredAnswer:
    if result.value is not None and not isfinite(result.value):
        return ScoredAnswer(None, f"the scorer gave {result.value}")
    return result


def _claim(path: Path, info: ScorerInfo, inputs: Sequence[ScorerInput], today: str, begun: bool) -> None:
    """Writes scores.<name>.json; after the first score it must agree with the one that is there.

    Raises:
        UserError: another scorer, version, setting or set of answers was scored under this name.
    """
    digest = hashlib.sha256("".join(f"{s.to_json()}\n{c.to_json()}\n" for s, c in inputs).encode())
    claim = json.loads(
        json.dumps(
            {
                "scorer": info.stamp,
                **asdict(info),
                "n_answers": len(inputs),
                "answers_sha256": digest.hexdigest(),
                "begun": today,
            }
        )
    )
    if not path.exists() or not begun:
        directory.write_json(path, claim)
        return
    found = directory.read_json(path)
    changed = [key for key in claim if key != "begun" and claim[key] != found.get(key)]
    if changed:
        raise UserError(
            f"{path} was made by {found.get('scorer')}, this is {info.stamp} ({', '.join(changed)} differ); two of "
            "them are not averaged: move that file and its .jsonl away to score again"
        )
