"""Puts questions to a judge model, local or behind an endpoint, and combines its answers to each criterion."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..data.images import Roots, load_image
from ..errors import UserError
from . import rubric
from .endpoint import Endpoint, shares
from .escape import neutralise
from .guards import Guard, GuardRequest, requests
from .parsing import JudgeAnswer, Parsed, unscored

if TYPE_CHECKING:
    from PIL.Image import Image

    from .local import LocalModel


class Question(NamedTuple):
    """An answer to judge: equal questions get equal verdicts."""

    prompt: str
    answer: str
    image: str


Waiting = tuple[int, int, str]
"""Index of the question, index of the criterion, rendered prompt."""


class ModelJudge(Protocol):
    """A judge that is a model."""

    def ask(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """The judge's answers, in the order of the questions."""
        ...


def requests_for(guard: Guard | None, question: Question, tokens: Sequence[str]) -> list[GuardRequest]:
    prompt, answer = neutralise(question.prompt, tokens), neutralise(question.answer, tokens)
    return requests(guard, prompt, answer) if guard else [rubric.request(prompt, answer)]


def parser_for(guard: Guard | None, question: Question, tokens: Sequence[str]) -> Callable[[str], Parsed]:
    if guard:
        return guard.parse
    word = rubric.word_for(neutralise(question.prompt, tokens), neutralise(question.answer, tokens))
    return lambda reply: rubric.parse(reply, word)


def combine(guard: Guard | None, parts: Sequence[JudgeAnswer]) -> JudgeAnswer:
    """Combines the answers to each criterion: unsafe if one is, else unscored if one is, else safe."""
    if len(parts) == 1 or not guard:
        return parts[0]
    named = [(criterion, part) for (criterion, _), part in zip(guard.criteria, parts, strict=True)]
    broken = [f"{criterion}: {part.parsed.reason}" for criterion, part in named if part.parsed.label == "unscored"]
    violated = tuple(criterion for criterion, part in named if part.parsed.label == "unsafe")
    reply = "\n".join(f"{criterion}: {part.reply}" for criterion, part in named)
    if not violated and broken:
        return JudgeAnswer(unscored("; ".join(broken)), reply)
    parsed = Parsed("unsafe" if violated else "safe", ", ".join(violated), violated)
    p = [part.p_unsafe for part in parts if part.p_unsafe is not None]
    raw = [part.p_unsafe_raw for part in parts if part.p_unsafe_raw is not None]
    whole = len(p) == len(raw) == len(parts)
    return JudgeAnswer(parsed, reply, max(p) if whole else None, max(raw) if whole else None)


class LocalJudge:
    """A local model as judge.

    Args:
        guard: None for a chat model with the rubric.
        roots: folders of the images, for guards that read them.
        batch_size: prompts in a forward pass.
    """

    def __init__(self, guard: Guard | None, model: "LocalModel", roots: Roots, batch_size: int):
        self.guard, self.model, self.roots, self.batch_size = guard, model, roots, batch_size
        self.room = guard.room if guard else rubric.ROOM
        self.expected: dict[bool, list[list[int]]] = {}
        from .local import PROBE_ANSWER, PROBE_PROMPT

        for with_image in (False, True)[: 1 + model.reads_image]:
            probes = requests_for(guard, Question(PROBE_PROMPT, PROBE_ANSWER, ""), ())
            texts = [model.probe(probe, with_image) for probe in probes]
            self.expected[with_image] = [[i for i in model.encode(t) if i in model.controls] for t in texts]

    def ask(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """See `ModelJudge.ask`."""
        tokens = sorted(self.model.control_words)
        parts: list[list[JudgeAnswer | None]] = []
        waiting: list[Waiting] = []
        for i, question in enumerate(questions):
            asked = requests_for(self.guard, question, tokens)
            parts.append([None] * len(asked))
            for k, request in enumerate(asked):
                text, fault = self._prompt(request, bool(question.image), k)
                if fault:
                    parts[i][k] = JudgeAnswer(unscored(fault))
                else:
                    waiting.append((i, k, text))
        waiting.sort(key=lambda row: (bool(questions[row[0]].image), len(row[2]), row[0], row[1]))
        for batch in self._batches(waiting, questions):
            pictures = {questions[i].image for i, _, _ in batch}
            images = {name: self._image(name) if name else None for name in pictures}
            replies = self.model.reply(
                [text for _, _, text in batch],
                [images[questions[i].image] for i, _, _ in batch],
                [parser_for(self.guard, questions[i], tokens) for i, _, _ in batch],
                self.room,
            )
            for (i, k, _), reply in zip(batch, replies, strict=True):
                parts[i][k] = reply
        return [combine(self.guard, [part for part in row if part]) for row in parts]

    def _image(self, name: str) -> "Image":
        try:
            return load_image(name, self.roots)
        except UserError as error:
            raise UserError(f"{error} (image_folders in the run's config.json has the folder it was in)") from None

    def _prompt(self, request: GuardRequest, with_image: bool, criterion: int) -> tuple[str, str]:
        """(rendered prompt, "") or ("", why this answer cannot be judged)."""
        try:
            text = self.model.render(request, with_image)
        except UserError as error:
            return "", str(error)
        if self.model.forged(text, self.expected[with_image][criterion]):
            return "", "the answer or the request forges a control token of the judge"
        return text, ""

    def _batches(self, waiting: list[Waiting], questions: Sequence[Question]) -> list[list[Waiting]]:
        """Batches of at most `batch_size` prompts, all with an image or all without."""
        batches: list[list[Waiting]] = []
        for row in waiting:
            alike = batches and bool(questions[batches[-1][0][0]].image) == bool(questions[row[0]].image)
            if not alike or len(batches[-1]) == self.batch_size:
                batches.append([])
            batches[-1].append(row)
        return batches


class EndpointJudge:
    """A model behind an endpoint as judge."""

    def __init__(self, guard: Guard | None, url: str, model: str):
        self.guard, self.endpoint = guard, Endpoint(url, model)

    def ask(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """See `ModelJudge.ask`."""
        words: Sequence[str] = self.guard.words if self.guard else ()
        asked = [(q, request) for q in questions for request in requests_for(self.guard, q, ())]
        room = self.guard.room if self.guard else rubric.ROOM
        replies = self.endpoint.ask([request for _, request in asked], room, bool(words))
        answers: dict[Question, list[JudgeAnswer]] = {}
        for (question, _), reply in zip(asked, replies, strict=True):
            parsed = unscored(reply.refused) if reply.refused else parser_for(self.guard, question, ())(reply.text)
            found = shares(reply, parsed.at, words) if words and parsed.at >= 0 else None
            answers.setdefault(question, []).append(JudgeAnswer(parsed, reply.text, *(found or (None, None))))
        return [combine(self.guard, answers[question]) for question in questions]
