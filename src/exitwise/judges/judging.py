"""Judges a run with a model: a guard or a rubric, local or behind an endpoint, resumable like the audit itself.

Completions are taken in windows of 8 batches, in the order of completions.jsonl. Inside a window questions are batched
by length; a window is on disk whole before the next begins. Requests depend only on the run and on the options that
judge.<name>.json records, so a judging that was killed resumes where it stopped and ends with the same bytes. A text
that was judged before (refusals repeat over the exits) is not judged again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..run import directory
from ..run.provenance import versions
from ..run.records import Completion, Sample, Verdict
from ..run.run import Run
from ..run.typed import Json
from .asking import EndpointJudge, LocalJudge, ModelJudge, Question, requests_for
from .config import Judging
from .endpoint import check_address
from .guards import GUARDS, Guard
from .parsing import JudgeAnswer, Parsed
from .vqa import judge_vqa

WINDOW = 8
"""Batches in a window: enough to sort by length, few enough to lose to a kill."""


def judge_with_model(run: Run, name: str, judging: Judging, tell: Callable[[int, int], None]) -> tuple[Verdict, ...]:
    """Writes verdicts.<name>.jsonl and judge.<name>.json, or resumes them; returns the verdicts.

    Args:
        tell: called with (completions judged, of how many) after each window.

    Raises:
        UserError: the judge cannot be loaded, or the verdicts there are another model's.
    """
    if judging.judge_batch_size < 1:
        raise UserError(f"--judge-batch-size got {judging.judge_batch_size}; expected at least 1")
    model = judging.model_of(name)
    reads_image = name in GUARDS and GUARDS[name].reads_image
    if judging.judge_endpoint:
        check_address(judging.judge_endpoint)  # before it is written to a file: it might contain a key
        if reads_image:
            raise UserError(f"{name} reads the image, which is not sent to an endpoint; leave --judge-endpoint out")
    path, completions = run.path / f"verdicts.{name}.jsonl", run.completions
    samples = {sample.id: sample for sample in run.samples}
    done = _begin(run, name, model, judging)
    if [(v.sample, v.exit) for v in done] != [(c.sample, c.exit) for c in completions[: len(done)]]:
        raise UserError(f"{path} does not follow completions.jsonl; delete it to judge again")
    window = WINDOW * judging.judge_batch_size
    if len(done) < len(completions):
        done = done[: len(done) // window * window]
        directory.truncate_to(path, len(done))

    def question(completion: Completion) -> Question | None:
        sample = samples[completion.sample]
        if sample.kind == "vqa" or not completion.text.strip():
            return None
        return Question(sample.prompt, completion.text, sample.image if reads_image else "")

    known = {q: _answer_in(v) for c, v in zip(completions, done, strict=False) if (q := question(c))}
    judge: ModelJudge | None = None
    sink = directory.Appender(path)
    try:
        for start in range(len(done), len(completions), window):
            rows = completions[start : start + window]
            new = [q for q in dict.fromkeys(map(question, rows)) if q and q not in known]
            if new:
                judge = judge or _load_judge(run, name, model, judging)
                known |= zip(new, judge.ask(new), strict=True)
            verdicts = [_verdict(name, samples[c.sample], c, known, question(c)) for c in rows]
            sink.append(verdicts)
            done += verdicts
            tell(len(done), len(completions))
    finally:
        sink.close()
        run.keep_verdicts(name, done)
    return run.verdicts[name]


def _begin(run: Run, name: str, model: str, judging: Judging) -> list[Verdict]:
    """Returns the verdicts that are there already; writes judge.<name>.json where there are none."""
    card = f"judge.{name}.json"
    identity: dict[str, Json] = {
        "judge": name,
        "model": model,
        "checkpoint_sha256": _checkpoint(Path(model)),
        "prompt_sha256": _prompt_digest(GUARDS.get(name)),
        "endpoint": judging.judge_endpoint,
        "batch_size": judging.judge_batch_size,
        "completions_sha256": hashlib.sha256((run.path / "completions.jsonl").read_bytes()).hexdigest(),
    }
    verdicts, begun = list(run.verdicts.get(name, ())), run.read_object(card)
    if begun and verdicts:  # without a verdict nothing is lost: a typo may be corrected
        if changed := [key for key, value in identity.items() if begun.get(key) != value]:
            raise UserError(
                f"{run.path}/verdicts.{name}.jsonl was made with other options ({', '.join(changed)} differ); repeat "
                f"those to resume it, or delete {run.path / card} to judge again"
            )
        return verdicts
    run.write_verdicts(name, [])
    installed: dict[str, Json] = {**versions("torch", "transformers", "tokenizers")}
    run.write_object(card, {**identity, "versions": installed})
    return []


def _prompt_digest(guard: Guard | None) -> str:
    """Of the request around a question and an answer; the chat template aside, which belongs to the checkpoint."""
    asked = requests_for(guard, Question("question", "answer", ""), ())
    # Spelled out, since judge.<name>.json of earlier runs has the digest of this text.
    lines = [f"Request(messages={r.messages!r}, text={r.text!r}, template={r.template!r})" for r in asked]
    return hashlib.sha256(f"[{', '.join(lines)}]".encode()).hexdigest()


def _checkpoint(folder: Path) -> str | None:
    """Digest of a local checkpoint: its small files, and the sizes of its weights; None for a hub id."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".model")):
        digest.update(f"{path.name} {path.stat().st_size}\0".encode())
        digest.update(path.read_bytes() if path.suffix in (".json", ".jinja") else b"")
    return digest.hexdigest()


def _verdict(
    name: str, sample: Sample, completion: Completion, known: dict[Question, JudgeAnswer], question: Question | None
) -> Verdict:
    if question:
        parsed, reply, p, raw = known[question]
        fields = (parsed.label, parsed.reason, parsed.categories, p, raw, parsed.refusal, parsed.score, reply)
        return Verdict(sample.id, completion.exit, name, *fields)
    label, reason = judge_vqa(sample, completion) if sample.kind == "vqa" else ("unscored", "empty answer")
    return Verdict(sample.id, completion.exit, name, label, reason)  # type: ignore[arg-type]


def _answer_in(verdict: Verdict) -> JudgeAnswer:
    parsed = Parsed(verdict.label, verdict.reason, verdict.categories, verdict.refusal, score=verdict.score)
    return JudgeAnswer(parsed, verdict.reply, verdict.p_unsafe, verdict.p_unsafe_raw)


def _load_judge(run: Run, name: str, model: str, judging: Judging) -> ModelJudge:
    guard = GUARDS.get(name)
    if judging.judge_endpoint:
        return EndpointJudge(guard, judging.judge_endpoint, model)
    from . import local

    words, marks = (guard.words, guard.marks) if guard else ((), ())
    reads_image = guard is not None and guard.reads_image
    roots = _image_folders(run) if reads_image else None
    return LocalJudge(guard, local.load(model, words, marks, reads_image), roots, judging.judge_batch_size)


def _image_folders(run: Run) -> dict[str, Path]:
    """Folders of the images, by the first part of their names; empty for labelled answers, which are not a run."""
    config = run.read_object("config.json") or {}
    images = {"file": config["images"]} if config.get("images") else {}
    folders = config.get("image_folders", {})
    return {name: Path(str(place)) for name, place in (images | (folders if isinstance(folders, dict) else {})).items()}
