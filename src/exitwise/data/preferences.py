"""Loads preference pairs (a prompt, the chosen and the rejected answer) from HH-RLHF files, plain rows or the hub.

HH-RLHF (Bai et al. 2022, "Training a helpful and harmless assistant with reinforcement learning from human feedback")
writes a whole dialogue twice, once per answer: `\\n\\nHuman: … \\n\\nAssistant: …`. What lies before the last
`\\n\\nAssistant:` is the prompt and must be the same in both; what lies after it are the two answers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..run.records import Record
from .prompts import CATEGORY_COLUMNS, MAX_LABEL, MAX_PROMPT, PROMPT_COLUMNS, fault_of, label_of
from .rows import FileRow, read_rows, show

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HUB_FILES = ("train", "test")
"""Splits of a data set on the hub, in the order in which one is looked for: `<subfolder>/<split>.jsonl.gz`."""


@dataclass(frozen=True)
class Preference(Record):
    """Two answers to one prompt, the first preferred."""

    prompt: str
    """One question, or a dialogue that begins with `\\n\\nHuman:` and ends with what the human said last."""
    chosen: str
    rejected: str
    category: str = ""
    source: str = ""
    """File and line."""


class LoadedPairs(NamedTuple):
    """What a file holds."""

    pairs: list[Preference]
    skipped: list[str]
    """`FILE, line N: reason`."""


def load_preferences(source: str | Path, limit: int | None = None) -> LoadedPairs:
    """Pairs of a file (.jsonl, .json, .csv, .tsv, each also .gz) or of a data set on the hub.

    A row has `chosen` and `rejected`, and either a prompt (first of PROMPT_COLUMNS) or, without one, two HH-RLHF
    dialogues; a category (first of CATEGORY_COLUMNS) is optional. A hub id may name a subfolder and a split:
    `Anthropic/hh-rlhf:harmless-base`, `Anthropic/hh-rlhf:harmless-base/test`. Answers lose white space at both ends,
    which HH-RLHF uses freely. Every other row is a line in `skipped`. Reading ends after `limit` pairs.

    Raises:
        UserError: the file or data set cannot be read, or has no usable pair.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected a whole number of at least 1")
    path = _locate(source)
    name = path.name.encode("utf-8", "backslashreplace").decode()
    pairs: list[Preference] = []
    skipped: list[str] = []
    for row in read_rows(path):
        if len(pairs) == limit:
            break
        pair = row.fault or _pair(row, f"{name}:{row.place.split()[-1]}")
        if isinstance(pair, str):
            skipped.append(f"{name}, {row.place}: {pair}")
        else:
            pairs.append(pair)
    if not pairs:
        raise UserError(
            f"{show(path)} has no usable pair ({'; '.join(skipped[:1]) or 'it is empty'}); "
            "expected rows with chosen and rejected, as in HH-RLHF, or with prompt, chosen and rejected"
        )
    return LoadedPairs(pairs, skipped)


def turns(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt as chat messages, roles `user` and `assistant`; a prompt without marks is one user turn."""
    if not prompt.startswith(HUMAN):
        return [{"role": "user", "content": prompt}]
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _pair(row: FileRow, source: str) -> Preference | str:
    """The pair of a row, or the reason why there is none."""
    for key in ("chosen", "rejected"):
        if fault := fault_of(row.cells.get(key), key, MAX_PROMPT):
            return fault
    texts = _split(row.cells)
    if isinstance(texts, str):
        return texts
    prompt, chosen, rejected = texts
    for what, text in (("prompt", prompt), ("chosen answer", chosen), ("rejected answer", rejected)):
        if fault := fault_of(text, what, MAX_PROMPT):
            return fault
    if chosen == rejected:
        return "chosen and rejected are the same"
    category = label_of(next((row.cells[c] for c in CATEGORY_COLUMNS if c in row.cells), None))
    if category and (fault := fault_of(category, "category", MAX_LABEL)):
        return fault
    return Preference(str(prompt), chosen, rejected, category, source)


def _split(cells: Mapping[str, object]) -> tuple[object, str, str] | str:
    """(prompt, chosen, rejected) of a row; a dialogue keeps its leading mark and loses the last `\\n\\nAssistant:`."""
    chosen, rejected = str(cells["chosen"]), str(cells["rejected"])
    column = next((name for name in PROMPT_COLUMNS if name in cells), None)
    if column is not None:
        return cells[column], chosen.strip(), rejected.strip()
    first, second = chosen.rfind(ASSISTANT), rejected.rfind(ASSISTANT)
    if min(first, second) < 0 or not chosen.startswith(HUMAN):
        return "there is no prompt, and the answers are no dialogues (`\\n\\nHuman: … \\n\\nAssistant: …`)"
    if chosen[:first] != rejected[:second]:
        return "the dialogues differ before their last answers"
    tail = len(ASSISTANT)
    return chosen[:first].rstrip(), chosen[first + tail :].strip(), rejected[second + tail :].strip()


def _locate(source: str | Path) -> Path:
    """The file itself, or the file of a hub data set, downloaded into the hub's own cache."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+)?", str(source)) or _has_extension(path):
        return path
    repo, _, inside = str(source).partition(":")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    tried = list(_candidates(inside))
    for name in tried:
        try:
            return Path(hf_hub_download(repo, name, repo_type="dataset"))
        except EntryNotFoundError as error:
            if type(error).__name__ == "LocalEntryNotFoundError":  # no connection, and not in the cache
                raise UserError(_not_had(source, error)) from None
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(_not_had(source, error)) from None
    raise UserError(f"the data set {repo} has none of {', '.join(tried)}; name the folder after a colon: {repo}:FOLDER")


def _not_had(source: object, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return f"cannot get {str(source)!r} ({reason}); expected a file, or a data set on the hub such as Anthropic/hh-rlhf"


def _has_extension(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")


def _candidates(inside: str) -> Iterator[str]:
    folder, _, last = inside.rpartition("/")
    if last in HUB_FILES:
        yield f"{folder}/{last}.jsonl.gz".lstrip("/")
        return
    for split in HUB_FILES:
        yield f"{inside}/{split}.jsonl.gz".lstrip("/")
