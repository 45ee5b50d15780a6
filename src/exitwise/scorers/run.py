"""Scores a finished run, batch by batch, and resumes after a kill.

scores.<name>.json     what the scorer is, when it began, and the answers it reads (their sha256): another scorer,
                       version, setting or set of answers is refused, so the file next to it holds one kind of number
scores.<name>.jsonl    one Score an answer, in the order of completions.jsonl
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from os import PathLike

from ..errors import UserError
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.records import Score
from ..run.run import Run
from .base import ScoredAnswer, Scorer, ScorerInfo, ScorerInput
from .factory import make_scorer


def score(
    run: Run | str | PathLike[str],
    scorer: str = "",
    *,
    model: str | None = None,
    batch_size: int | None = None,
    base_url: str | None = None,
    queries_per_second: float = 1.0,
    template: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Gives the answers of a run numbers, without its model; `exitwise score`. Stopped scoring is resumed.

    Writes scores.<name>.jsonl and .json of each scorer, and score_metrics.json with the figures of all of them.

    Args:
        scorer: names separated by commas; "" computes the figures of what is scored already.
        model: folder, file or hub id of the weights of detoxify or granite-guardian-hap.
        batch_size: answers in a forward pass, for scorers with weights.
        base_url: address of a server with the Perspective API; Google's by default.
        queries_per_second: rate limit of the Perspective API key.
        template: text format of a published reward model whose id is not known.
        trust_remote_code: load weights that can carry code (detoxify's pickle files).

    Raises:
        UserError: there is no such scorer or it cannot be loaded, or the run cannot be scored by it.
    """
    from ..measure.scores import write_score_metrics

    names = list(dict.fromkeys(word.strip() for word in scorer.split(",") if word.strip()))
    if model is not None and len(names) != 1:
        raise UserError(f"--model is for one scorer, --scorer names {len(names)}; score with one at a time")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size got {batch_size}; expected at least 1")
    run, progress, today = Run.open(run), progress or Silent(), datetime.now(UTC).date().isoformat()
    with directory.edit_run(run.path):
        for name in names:
            made = make_scorer(
                name,
                model=model,
                batch_size=batch_size,
                base_url=base_url,
                queries_per_second=queries_per_second,
                template=template,
                trust_remote_code=trust_remote_code,
            )
            if made.info.notice:
                progress.say(made.info.notice)
            score_run(run, made, today, progress)
        write_score_metrics(run)
    return run


def score_run(run: Run, scorer: Scorer, today: str, progress: Progress | None = None) -> tuple[Score, ...]:
    """Scores every answer that `scorer` reads and that has no score yet; equal answers are scored once.

    A batch is on disk whole, or is cut off and scored again, so a run killed at any moment ends with the same bytes.
    The caller holds the run (`directory.edit_run`).

    Args:
        today: the day, as 2026-11-21, kept from the first start on.

    Raises:
        UserError: the run is unfinished, has no such answers, or was scored under this name by something else.
    """
    info = scorer.info
    samples = {sample.id: sample for sample in run.finished().samples}
    inputs = [(samples[c.sample], c) for c in run.completions if samples[c.sample].kind in info.kinds]
    if not inputs:
        raise UserError(f"{run.path} has no answers of the kind {' or '.join(info.kinds)}, which {info.name} reads")
    path = run.path / f"scores.{info.file_name}.jsonl"
    written = list(run.scores.get(info.file_name, ()))
    _claim(run, info, inputs, today, begun=bool(written))
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
        run.keep_scores(info.file_name, scores)
    return run.scores[info.file_name]


def _finite(result: ScoredAnswer) -> ScoredAnswer:
    if result.value is not None and not isfinite(result.value):
        return ScoredAnswer(None, f"the scorer gave {result.value}")
    return result


def _claim(run: Run, info: ScorerInfo, inputs: Sequence[ScorerInput], today: str, begun: bool) -> None:
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
    name = f"scores.{info.file_name}.json"
    found = run.read_object(name)
    if found is None or not begun:
        run.write_object(name, claim)
        return
    changed = [key for key in claim if key != "begun" and claim[key] != found.get(key)]
    if changed:
        raise UserError(
            f"{run.path / name} was made by {found.get('scorer')}, this is {info.stamp} ({', '.join(changed)} differ); "
            "two of them are not averaged: move that file and its .jsonl away to score again"
        )
