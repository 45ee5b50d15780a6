"""Writes the transcripts of a run as the JSON inside the report: escaped, cut to size, with thumbnails."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..run.exit import Exit
from ..run.figures import Metrics
from ..run.records import Completion, Sample, Verdict
from ..run.run import Run
from ..run.typed import Json
from .text import visible

ANSWER_LIMIT = 2_000
"""Characters of an answer or prompt that the report shows; the run directory has the whole text."""
REASON_LIMIT = 300
DATA_LIMIT = 2_400_000
"""Largest size of transcripts and thumbnails in bytes; with the tables the file stays under 3 MB."""
THUMBNAIL_LIMIT = 60_000


SampleAtExit = tuple[str, Exit]


class Transcripts(NamedTuple):
    """The JSON for the page; `shown` of the `total` answers of the run are in it."""

    shown: int
    total: int
    json: str


class TranscriptCard(NamedTuple):
    """A sample with its answers, as the page holds it."""

    sample: Sample
    n_answers: int
    json: dict[str, Json]


def page_data(run: Run, splits: Mapping[str, Sequence[Exit]]) -> Transcripts:
    """The transcripts that fit the page.

    Samples on whose answers the judges differ come first, those with most such answers before the others; `splits`
    holds the exits of those answers by sample. Where not all samples fit, others are left out evenly over the run, each
    with its answers at every exit, so that exits can still be compared on the same prompt.
    """
    answers: dict[str, list[Completion]] = {sample.id: [] for sample in run.samples}
    for completion in run.completions:
        if completion.sample not in answers:
            raise UserError(f"{run.path}: completions.jsonl answers {completion.sample!r}, which samples.jsonl lacks")
        answers[completion.sample].append(completion)
    verdicts = _verdicts(run)
    order = sorted(run.samples, key=lambda sample: -len(splits.get(sample.id, ())))
    cards = [
        TranscriptCard(sample, len(said), _card(sample, said, verdicts, splits.get(sample.id, ())))
        for sample in order
        if (said := answers[sample.id])
    ]
    images = _thumbnails(run, {card.sample.image for card in cards})
    costs = [len(_escape(card.json).encode()) for card in cards]

    def cost(kept: Iterable[int]) -> int:
        kept = list(kept)
        pictures = {cards[i].sample.image for i in kept}
        return sum(costs[i] for i in kept) + sum(len(uri) for name, uri in images.items() if name in pictures)

    split = sum(any(c.exit in splits.get(c.sample, ()) for c in answers[card.sample.id]) for card in cards)
    kept = [cards[i] for i in _even_subset(len(cards), cost, split)]
    names = {card.sample.image for card in kept}
    data: dict[str, Json] = {
        "exits": [exit.to_json() for exit in sorted({c.exit for card in kept for c in answers[card.sample.id]})],
        "compare": [exit.to_json() for exit in _exits_to_compare(run.metrics)],
        "default": run.metrics.default_exit.to_json(),
        "limit": ANSWER_LIMIT,
        "images": {visible(name): uri for name, uri in images.items() if name in names},
        "samples": [card.json for card in kept],
    }
    return Transcripts(sum(card.n_answers for card in kept), len(run.completions), _escape(data))


def _verdicts(run: Run) -> dict[SampleAtExit, list[Verdict]]:
    """All verdicts on each answer, that of the judge of the metrics first where there is one."""
    first = run.metrics.judge
    found: dict[SampleAtExit, list[Verdict]] = {}
    for verdict in (verdict for verdicts in run.verdicts.values() for verdict in verdicts):
        found.setdefault((verdict.sample, verdict.exit), []).append(verdict)
    return {at: sorted(verdicts, key=lambda verdict: verdict.judge != first) for at, verdicts in found.items()}


def _card(
    sample: Sample,
    completions: list[Completion],
    verdicts: Mapping[SampleAtExit, list[Verdict]],
    splits: Sequence[Exit],
) -> dict[str, Json]:
    return {
        "id": visible(sample.id),
        "prompt": visible(sample.prompt[:ANSWER_LIMIT]),
        "kind": sample.kind,
        "category": visible(sample.category),
        "image": visible(sample.image),
        "accepted": [visible(answer) for answer in sample.answers],
        "answers": [
            _answer(completion, verdicts.get((sample.id, completion.exit), []), completion.exit in splits)
            for completion in sorted(completions, key=lambda completion: completion.exit)
        ],
    }


def _answer(completion: Completion, verdicts: list[Verdict], split: bool) -> dict[str, Json]:
    """Args: verdicts: the one to show, then those of other judges."""
    verdict = verdicts[0] if verdicts else None
    return {
        "exit": completion.exit.to_json(),
        "text": visible(completion.text[:ANSWER_LIMIT]),
        "length": len(completion.text),
        "tokens": len(completion.tokens),
        "finish": completion.finish,
        "label": verdict.label if verdict else "not judged",
        "judge": visible(verdict.judge) if verdict else "",
        "reason": visible(verdict.reason[:REASON_LIMIT]) if verdict else "",
        "others": [visible(f"{v.judge}: {v.label}") for v in verdicts if verdict and v.judge != verdict.judge],
        "split": split,
    }


def _exits_to_compare(metrics: Metrics) -> tuple[Exit, Exit]:
    """The two exits selected first on the page: the default one, and the one with the largest ASR beside it."""
    others = [row for row in metrics.exits if row.exit != metrics.default_exit]
    worst = max(others, key=lambda row: row.asr.value or 0, default=None)
    return metrics.default_exit, worst.exit if worst else metrics.default_exit


def _thumbnails(run: Run, wanted: set[str]) -> dict[str, str]:
    """Image name to data URI, of files in the run's image folder that are small JPEGs."""
    folder, index = run.path / "images", run.read_object("images/index.json") or {}
    found = {}
    for name, file in sorted(index.items()):
        path = folder / Path(str(file)).name
        if name not in wanted or not path.is_file() or path.stat().st_size > THUMBNAIL_LIMIT:
            continue
        content = path.read_bytes()
        if content.startswith(b"\xff\xd8\xff"):
            found[name] = "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")
    return found


def _even_subset(n: int, cost: Callable[[Iterable[int]], int], first: int = 0) -> list[int]:
    """Indices of the first `first` of n items and of as many others as fit DATA_LIMIT, evenly spaced; where not even
    the first ones fit, of as many of those."""
    if first and cost(range(first)) > DATA_LIMIT:
        return _even_subset(first, cost)
    rest = n - first

    def chosen(k: int) -> list[int]:
        return [*range(first), *(first + i * rest // k for i in range(k))]

    low, high = 0, rest
    while low < high:
        middle = (low + high + 1) // 2
        if cost(chosen(middle)) <= DATA_LIMIT:
            low = middle
        else:
            high = middle - 1
    return chosen(low)


def _escape(value: Json) -> str:
    """JSON that is safe inside <script>: no `<`, `>`, `&`, and no line separators of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
