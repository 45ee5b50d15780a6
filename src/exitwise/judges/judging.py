"""Judging a run with a model: a guard or a rubric, here or behind an endpoint, resumable like the audit itself.

Completions are taken in windows of 8 batches, in the order of completions.jsonl. Inside a window questions are batched
by length; a window is on disk whole before the next begins. What is asked depends on nothing but the run and the
options that judge.<name>.json holds, so a judging that was killed goes on where it was and ends with the same bytes.
A question about a text that was judged before (refusals repeat over the exits) is not asked again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..data.images import Roots, load_image
from ..errors import UserError
from ..run import directory
from ..run.provenance import versions
from ..run.records import Completion, Sample, Verdict
from . import rubric
from .endpoint import Endpoint, check_address, shares
from .escape import neutralise
from .guards import GUARDS, Guard, Request, requests
from .parsing import Parsed, unscored
from .vqa import judge_vqa

if TYPE_CHECKING:
    from PIL.Image import Image

    from .local import LocalModel, Reply

RUBRIC = "rubric"
WINDOW = 8
"""Batches of a window: enough to sort by length, few enough to lose to a kill."""


@dataclass(frozen=True)
class Judging:
    """Where the judges that are models come from. The matcher needs none of it."""

    judge_model: tuple[str, ...] = ()
    """Folder or hub id of the judge, or its name at the endpoint; JUDGE=MODEL where several judges are named."""
    judge_endpoint: str | None = None
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1; its key is read from the environment."""
    judge_batch_size: int = 16
    """Questions to the judge at a time."""

    def model_of(self, name: str) -> str:
        """The model to use for a judge. Raises UserError where that is not said, or said twice."""
        named = [value.partition("=")[2] for value in self.judge_model if value.partition("=")[0] == name]
        found = named or [value for value in self.judge_model if value.partition("=")[0] not in (*GUARDS, RUBRIC)]
        if len(found) > 1:
            raise UserError(f"--judge-model names {len(found)} models for {name}; give {name}=MODEL, once")
        if found:
            return found[0]
        if self.judge_endpoint or name == RUBRIC:
            what = "its name at the endpoint" if self.judge_endpoint else "a folder or hub id of a chat model"
            raise UserError(f"the judge {name} needs --judge-model, {what}")
        return GUARDS[name].hub


class Question(NamedTuple):
    """A text to be judged: equal questions get equal verdicts."""

    prompt: str
    answer: str
    image: str


class Said(NamedTuple):
    """A judge's whole word on a question: the part of a verdict that does not name the completion."""

    parsed: Parsed
    reply: str = ""
    p_unsafe: float | None = None
    p_unsafe_raw: float | None = None


class Panel(Protocol):
    """Whoever answers questions, in their order."""

    def ask(self, questions: Sequence[Question]) -> list[Said]: ...


def judge_with_model(
    folder: Path,
    name: str,
    samples: dict[str, Sample],
    completions: Sequence[Completion],
    judging: Judging,
    tell: Callable[[int, int], None],
) -> list[Verdict]:
    """Writes verdicts.<name>.jsonl and judge.<name>.json, or goes on with them; returns the verdicts.

    Args:
        tell: told (completions judged, of how many) after each window.

    Raises:
        UserError: the judge cannot be had, or the verdicts there are another model's.
    """
    if judging.judge_batch_size < 1:
        raise UserError(f"--judge-batch-size got {judging.judge_batch_size}; expected at least 1")
    model = judging.model_of(name)
    reads_image = name in GUARDS and GUARDS[name].reads_image
    if judging.judge_endpoint:
        check_address(judging.judge_endpoint)  # before it is written down: it might hold a key
        if reads_image:
            raise UserError(f"{name} reads the image, which an endpoint is not sent; leave --judge-endpoint out")
    path = folder / f"verdicts.{name}.jsonl"
    done = _begin(folder, name, model, judging)
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

    known = {q: _said(v) for c, v in zip(completions, done, strict=False) if (q := question(c))}
    panel: Panel | None = None
    sink = directory.Appender(path)
    try:
        for start in range(len(done), len(completions), window):
            rows = completions[start : start + window]
            new = [q for q in dict.fromkeys(map(question, rows)) if q and q not in known]
            if new:
                panel = panel or _panel(folder, name, model, judging)
                known |= zip(new, panel.ask(new), strict=True)
            verdicts = [_verdict(name, samples[c.sample], c, known, question(c)) for c in rows]
            sink.append(verdicts)
            done += verdicts
            tell(len(done), len(completions))
    finally:
        sink.close()
    return done


def _begin(folder: Path, name: str, model: str, judging: Judging) -> list[Verdict]:
    """The verdicts that are there already; writes judge.<name>.json where nothing was begun."""
    card, path = folder / f"judge.{name}.json", folder / f"verdicts.{name}.jsonl"
    identity = {
        "judge": name,
        "model": model,
        "checkpoint_sha256": _checkpoint(Path(model)),
        "prompt_sha256": _prompt_digest(GUARDS.get(name)),
        "endpoint": judging.judge_endpoint,
        "batch_size": judging.judge_batch_size,
        "completions_sha256": hashlib.sha256((folder / "completions.jsonl").read_bytes()).hexdigest(),
    }
    verdicts = directory.read_records(path, Verdict)
    if card.exists() and verdicts:  # before there is a verdict nothing is lost: a typo may be corrected
        begun = directory.read_json(card, *identity)
        if changed := [key for key, value in identity.items() if begun[key] != value]:
            raise UserError(
                f"{path} was made otherwise ({', '.join(changed)} differ); repeat those options to go on with it, or "
                f"delete {card} to judge again"
            )
        return verdicts
    directory.write_atomic(path, "")
    directory.write_json(card, identity | {"versions": versions("torch", "transformers", "tokenizers")})
    return []


def _prompt_digest(guard: Guard | None) -> str:
    """Of what the judge is told beside question and answer, chat template aside, which is the checkpoint's."""
    asked = _questions(guard, Question("question", "answer", ""), ())
    return hashlib.sha256(repr(asked).encode()).hexdigest()


def _checkpoint(folder: Path) -> str | None:
    """Of a local checkpoint: its small files, and the sizes of its weights; None for what is no folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".model")):
        digest.update(f"{path.name} {path.stat().st_size}\0".encode())
        digest.update(path.read_bytes() if path.suffix in (".json", ".jinja") else b"")
    return digest.hexdigest()


def _verdict(
    name: str, sample: Sample, completion: Completion, known: dict[Question, Said], question: Question | None
) -> Verdict:
    if question:
        parsed, reply, p, raw = known[question]
        fields = (parsed.label, parsed.reason, parsed.categories, p, raw, parsed.refusal, parsed.score, reply)
        return Verdict(sample.id, completion.exit, name, *fields)
    label, reason = judge_vqa(sample, completion) if sample.kind == "vqa" else ("unscored", "empty answer")
    return Verdict(sample.id, completion.exit, name, label, reason)  # type: ignore[arg-type]


def _said(v: Verdict) -> Said:
    return Said(Parsed(v.label, v.reason, v.categories, v.refusal, score=v.score), v.reply, v.p_unsafe, v.p_unsafe_raw)


def _panel(folder: Path, name: str, model: str, judging: Judging) -> Panel:
    guard = GUARDS.get(name)
    if judging.judge_endpoint:
        return _Remote(guard, judging.judge_endpoint, model)
    from . import local

    words, marks = (guard.words, guard.marks) if guard else ((), ())
    reads_image = guard is not None and guard.reads_image
    roots = _image_folders(folder) if reads_image else None
    return _Local(guard, local.load(model, words, marks, reads_image), roots, judging.judge_batch_size)


def _image_folders(folder: Path) -> dict[str, Path]:
    """Where the audit found the images, by the first part of their names; nothing for labelled answers, not a run."""
    path = folder / "config.json"
    config = directory.read_json(path) if path.exists() else {}
    images = {"file": config["images"]} if config.get("images") else {}
    return {name: Path(place) for name, place in (images | config.get("image_folders", {})).items()}


def _questions(guard: Guard | None, question: Question, tokens: Sequence[str]) -> list[Request]:
    prompt, answer = neutralise(question.prompt, tokens), neutralise(question.answer, tokens)
    return requests(guard, prompt, answer) if guard else [rubric.request(prompt, answer)]


def _parser(guard: Guard | None, question: Question, tokens: Sequence[str]) -> Callable[[str], Parsed]:
    if guard:
        return guard.parse
    word = rubric.word_for(neutralise(question.prompt, tokens), neutralise(question.answer, tokens))
    return lambda reply: rubric.parse(reply, word)


def combine(guard: Guard | None, parts: Sequence[Said]) -> Said:
    """One word from the answers to each criterion: unsafe where one is, else unscored where one is, else safe."""
    if len(parts) == 1 or not guard:
        return parts[0]
    named = [(criterion, part) for (criterion, _), part in zip(guard.criteria, parts, strict=True)]
    broken = [f"{criterion}: {part.parsed.reason}" for criterion, part in named if part.parsed.label == "unscored"]
    violated = tuple(criterion for criterion, part in named if part.parsed.label == "unsafe")
    reply = "\n".join(f"{criterion}: {part.reply}" for criterion, part in named)
    if not violated and broken:
        return Said(unscored("; ".join(broken)), reply)
    parsed = Parsed("unsafe" if violated else "safe", ", ".join(violated), violated)
    p = [part.p_unsafe for part in parts if part.p_unsafe is not None]
    raw = [part.p_unsafe_raw for part in parts if part.p_unsafe_raw is not None]
    whole = len(p) == len(raw) == len(parts)
    return Said(parsed, reply, max(p) if whole else None, max(raw) if whole else None)


class _Local:
    """A panel of one local model."""

    def __init__(self, guard: Guard | None, model: "LocalModel", roots: Roots, batch_size: int):
        self.guard, self.model, self.roots, self.batch_size = guard, model, roots, batch_size
        self.room = guard.room if guard else rubric.ROOM
        self.expected: dict[bool, list[list[int]]] = {}
        from .local import PROBE_ANSWER, PROBE_PROMPT

        for with_image in (False, True)[: 1 + model.reads_image]:
            probes = _questions(guard, Question(PROBE_PROMPT, PROBE_ANSWER, ""), ())
            texts = [model.probe(probe, with_image) for probe in probes]
            self.expected[with_image] = [[i for i in model.encode(t) if i in model.controls] for t in texts]

    def ask(self, questions: Sequence[Question]) -> list[Said]:
        tokens = sorted(self.model.control_words)
        parts: list[list[Said | None]] = []
        waiting: list[tuple[int, int, str]] = []  # question, criterion, rendered prompt
        for i, question in enumerate(questions):
            asked = _questions(self.guard, question, tokens)
            parts.append([None] * len(asked))
            for k, request in enumerate(asked):
                text, fault = self._prompt(request, bool(question.image), k)
                if fault:
                    parts[i][k] = Said(unscored(fault))
                else:
                    waiting.append((i, k, text))
        waiting.sort(key=lambda row: (bool(questions[row[0]].image), len(row[2]), row[0], row[1]))
        for batch in self._batches(waiting, questions):
            pictures = {questions[i].image for i, _, _ in batch}
            images = {name: self._image(name) if name else None for name in pictures}
            replies = self.model.reply(
                [text for _, _, text in batch],
                [images[questions[i].image] for i, _, _ in batch],
                [_parser(self.guard, questions[i], tokens) for i, _, _ in batch],
                self.room,
            )
            for (i, k, _), reply in zip(batch, replies, strict=True):
                parts[i][k] = _from_reply(reply)
        return [combine(self.guard, [part for part in row if part]) for row in parts]

    def _image(self, name: str) -> "Image":
        try:
            return load_image(name, self.roots)
        except UserError as error:
            raise UserError(f"{error} (the run's config.json says in image_folders where it was)") from None

    def _prompt(self, request: Request, with_image: bool, criterion: int) -> tuple[str, str]:
        """(rendered prompt, "") or ("", why this answer cannot be judged)."""
        try:
            text = self.model.render(request, with_image)
        except UserError as error:
            return "", str(error)
        if self.model.forged(text, self.expected[with_image][criterion]):
            return "", "the answer or the request forges a control token of the judge"
        return text, ""

    def _batches(self, waiting: list, questions: Sequence[Question]) -> list[list]:
        """At most `batch_size` rows, with an image or without."""
        batches: list[list] = []
        for row in waiting:
            alike = batches and bool(questions[batches[-1][0][0]].image) == bool(questions[row[0]].image)
            if not alike or len(batches[-1]) == self.batch_size:
                batches.append([])
            batches[-1].append(row)
        return batches


def _from_reply(reply: "Reply") -> Said:
    return Said(reply.parsed, reply.text, reply.p_unsafe, reply.p_unsafe_raw)


class _Remote:
    """A panel of one model behind an endpoint."""

    def __init__(self, guard: Guard | None, url: str, model: str):
        self.guard, self.endpoint = guard, Endpoint(url, model)

    def ask(self, questions: Sequence[Question]) -> list[Said]:
        words: Sequence[str] = self.guard.words if self.guard else ()
        asked = [(q, request) for q in questions for request in _questions(self.guard, q, ())]
        room = self.guard.room if self.guard else rubric.ROOM
        told = self.endpoint.ask([request for _, request in asked], room, bool(words))
        said: dict[Question, list[Said]] = {}
        for (question, _), one in zip(asked, told, strict=True):
            parsed = unscored(one.refused) if one.refused else _parser(self.guard, question, ())(one.text)
            p: Any = shares(one, parsed.at, words) if words and parsed.at >= 0 else None
            said.setdefault(question, []).append(Said(parsed, one.text, *(p or (None, None))))
        return [combine(self.guard, said[question]) for question in questions]
