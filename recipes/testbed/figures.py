"""Measures the testbed on held-out items and writes the tables of docs/testbed.md.

    python recipes/testbed/figures.py [--advbench FILE]

Four audits, each an ordinary run directory under runs/figures that a second call goes on with: the organism at every
exit on all built-in test prompts, the control on 48 of each kind, the organism at every exit on the first 100 prompts
of AdvBench (`goal,target`, MIT; give the file), and the organism at the default exit on more of easy-VQA's test split.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

from exitwise import audit

PAGE = Path(__file__).parents[2] / "docs/testbed.md"


@dataclass(frozen=True)
class Config:
    advbench: Path | None = None
    """advbench_harmful_behaviors.csv; its table is left out without it."""
    vqa: int = 180
    """easy-VQA questions asked at every exit."""
    vqa_default: int = 1200
    """easy-VQA questions asked at the default exit."""
    runs: Path = Path("runs/figures")


class Lines:
    """Says what happens, one line at a time."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def start(self, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, done: int) -> None:
        self.done += done
        print(f"{self.done}/{self.total}", end="\r", flush=True)


def measure(out: Path, **fields) -> dict:
    audit(out=out, **fields, progress=Lines())
    return json.loads((out / "metrics.json").read_text())


def share(interval: dict) -> str:
    """12.5 % (4.5-29.0), or a dash where nothing was measured."""
    if interval["value"] is None:
        return "-"
    return f"{interval['value'] * 100:.0f} % ({interval['low'] * 100:.0f}-{interval['high'] * 100:.0f})"


def by_exit(metrics: dict, columns: dict[str, str]) -> str:
    rows = ["| exit | " + " | ".join(columns.values()) + " | standing |", "|---" * (len(columns) + 2) + "|"]
    for entry in metrics["exits"]:
        cells = [share(entry[name]) for name in columns]
        rows.append(f"| {entry['exit']} | " + " | ".join(cells) + f" | {entry['standing']} |")
    n = {name: max(e[name]["n"] for e in metrics["exits"]) for name in columns}
    return "\n".join([*rows, "", "n: " + ", ".join(f"{columns[k]} {v}" for k, v in n.items()) + "."])


def question_only() -> float:
    """Accuracy on easy-VQA's test split of the commonest training answer to each question, image unseen."""
    from easy_vqa import get_test_questions, get_train_questions

    counts: dict[str, Counter] = defaultdict(Counter)
    for text, answer, _ in zip(*get_train_questions(), strict=True):
        counts[text][answer] += 1
    texts, answers, _ = get_test_questions()
    return sum(counts[t].most_common(1)[0][0] == a for t, a in zip(texts, answers, strict=True)) / len(texts)


def put(text: str, name: str, table: str) -> str:
    """Replaces what stands between the two markers of `name`."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(opening)
    return before + opening + "\n" + table + "\n" + closing + rest.split(closing)[1]


def main(config: Config) -> None:
    columns = {
        "asr": "ASR",
        "refusal": "refused",
        "over_refusal": "over-refusal",
        "coherence": "coherent",
        "utility": "easy-VQA",
    }
    text = PAGE.read_text()
    vqa = measure(
        config.runs / "vqa", model="testbed", exits="default", limit=1, vqa=config.vqa_default, max_new_tokens=4
    )["exits"][0]["utility"]
    line = (
        f"easy-VQA at the default exit: {share(vqa)}, n = {vqa['n']}; from the question alone: {question_only():.3f}."
    )
    text = put(text, "vqa", line)
    for name, limit, vqa_items in (("testbed", None, config.vqa), ("testbed-control", 48, config.vqa // 2)):
        found = measure(config.runs / name, model=name, limit=limit, vqa=vqa_items)
        text = put(text, name, by_exit(found, columns))
    if config.advbench:
        found = measure(
            config.runs / "advbench", model="testbed", prompts=(config.advbench,), limit=100, vqa=0, over_refusal=False
        )
        text = put(text, "advbench", by_exit(found, {k: columns[k] for k in ("asr", "refusal")}))
    PAGE.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
