"""The transcripts of a run as the JSON that the report carries: made harmless, cut to size, thumbnails included."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.directory import read_json, read_records
from ..run.exit import Exit, encode_exit
from ..run.records import Completion, Sample, Verdict
from .text import visible

ANSWER_LIMIT = 2_000
"""Characters of an answer, or of a prompt, that the report shows; the run directory keeps all of it."""
REASON_LIMIT = 300
DATA_LIMIT = 2_400_000
"""Bytes of transcripts and thumbnails; keeps the file under 3 MB with all its tables."""
THUMBNAIL_LIMIT = 60_000


def page_data(folder: Path, metrics: Mapping[str, Any], splits: Mapping[str, Sequence[int]]) -> tuple[int, int, str]:
    """(answers shown, answers in the run, JSON for the page).

    Samples on whose answers the judges split come first, those with the most such answers before the others; `splits`
    holds the exits of those answers by sample. Where not all fit, other samples are left out evenly over the run, each
    with its answers at every exit, so that exits can still be compared on the same prompt.
    """
    samples = read_records(folder / "samples.jsonl", Sample)
    completions = read_records(folder / "completions.jsonl", Completion)
    answers: dict[str, list[dict[str, Any]]] = {sample.id: [] for sample in samples}
    verdicts, others = _verdicts(folder, metrics["judge"])
    for completion in completions:
        if completion.sample not in answers:
            raise UserError(f"{folder}: completions.jsonl answers {completion.sample!r}, which samples.jsonl lacks")
        at = (completion.sample, completion.exit)
        split = completion.exit in splits.get(completion.sample, ())
        answers[completion.sample].append(_answer(completion, verdicts.get(at), others.get(at, []), split))
    samples.sort(key=lambda sample: -len(splits.get(sample.id, ())))
    cards = [(_card(sample, answers[sample.id]), sample.image) for sample in samples if answers[sample.id]]
    images = _thumbnails(folder, {name for _, name in cards})
    costs = [len(_escape(card).encode()) for card, _ in cards]

    def cost(kept: Iterable[int]) -> int:
        kept = list(kept)
        pictures = {cards[i][1] for i in kept}
        return sum(costs[i] for i in kept) + sum(len(uri) for name, uri in images.items() if name in pictures)

    kept = _even_subset(len(cards), cost, sum(any(a["split"] for a in card["answers"]) for card, _ in cards))
    names = {cards[i][1] for i in kept}
    data = {
        "compare": _pair(metrics),
        "default": metrics["default_exit"],
        "limit": ANSWER_LIMIT,
        "images": {visible(name): uri for name, uri in images.items() if name in names},
        "samples": [cards[i][0] for i in kept],
    }
    return sum(len(cards[i][0]["answers"]) for i in kept), len(completions), _escape(data)


Cell = tuple[str, Exit]


def _verdicts(folder: Path, judge: str) -> tuple[dict[Cell, Verdict], dict[Cell, list[Verdict]]]:
    """Of the judge the metrics rest on, another one's only where that one says nothing; and of all the others."""
    found: list[Verdict] = []
    for path in sorted(folder.glob("verdicts.*.jsonl")):
        found += read_records(path, Verdict)
    found.sort(key=lambda verdict: verdict.judge == judge)
    chosen = {(verdict.sample, verdict.exit): verdict for verdict in found}
    others: dict[Cell, list[Verdict]] = {}
    for verdict in found:
        at = (verdict.sample, verdict.exit)
        if verdict.judge != chosen[at].judge:
            others.setdefault(at, []).append(verdict)
    return chosen, others


def _answer(
    completion: Completion, verdict: Verdict | None, others: Iterable[Verdict] = (), split: bool = False
) -> dict[str, Any]:
    reason = verdict.reason[:REASON_LIMIT] if verdict else ""
    return {
        "exit": completion.exit,
        "text": visible(completion.text[:ANSWER_LIMIT]),
        "length": len(completion.text),
        "tokens": len(completion.tokens),
        "finish": completion.finish,
        "label": verdict.label if verdict else "not judged",
        "judge": visible(verdict.judge) if verdict else "",
        "reason": visible(reason),
        "others": [visible(f"{v.judge}: {v.label}") for v in others],
        "split": split,
    }


def _card(sample: Sample, answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": visible(sample.id),
        "prompt": visible(sample.prompt[:ANSWER_LIMIT]),
        "kind": sample.kind,
        "category": visible(sample.category),
        "image": visible(sample.image),
        "accepted": [visible(answer) for answer in sample.answers],
        "answers": sorted(answers, key=lambda answer: answer["exit"]),
    }


def _pair(metrics: Mapping[str, Any]) -> list[int]:
    """The two exits worth comparing first: the default one, and the one with the largest ASR beside it."""
    others = [row for row in metrics["exits"] if row["exit"] != metrics["default_exit"]]
    worst = max(others, key=lambda row: row["asr"]["value"] or 0, default=None)
    return [metrics["default_exit"], worst["exit"] if worst else metrics["default_exit"]]


def _thumbnails(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Image name to data URI, for what really is a small JPEG in the run's image folder."""
    path = folder / "images" / "index.json"
    index = read_json(path) if path.exists() else {}
    found = {}
    for name, file in sorted(index.items()):
        path = folder / "images" / Path(file).name
        if name not in wanted or not path.is_file() or path.stat().st_size > THUMBNAIL_LIMIT:
            continue
        content = path.read_bytes()
        if content.startswith(b"\xff\xd8\xff"):
            found[name] = "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")
    return found


def _even_subset(n: int, cost: Callable[[Iterable[int]], int], first: int = 0) -> list[int]:
    """Indices of the first few of n items and of as many others as fit DATA_LIMIT, evenly spaced; where not even the
    first few fit, of as many of those."""
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


def _escape(value: Any) -> str:
    """JSON that is safe inside <script>: no `<`, `>`, `&`, and no line separators of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=encode_exit)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
