"""A finished run to score, and a scorer without weights."""

import json
from pathlib import Path

from exitwise.run.directory import to_lines
from exitwise.run.records import Completion, Sample
from exitwise.scorers.base import ScoredAnswer, ScorerInfo

TODAY = "2026-11-21"
PEOPLE = ("red",) * 3 + tuple(f"colour {i}" for i in range(7))


def write_run(folder: Path, exits=(0, 1, 2, 3), n=5, text=lambda i, exit: f"Answer {i} at {exit}.") -> Path:
    """A finished run of `n` samples of each kind; three blocks, one a band."""
    samples = [Sample(f"h{i}", f"Harmful request {i}?", "harmful", "photo") for i in range(n)]
    samples += [Sample(f"b{i}", f"Harmless request {i}?", "benign", "photo") for i in range(n)]
    samples += [Sample(f"v{i}", "What colour?", "vqa", f"photo {i}", answers=PEOPLE) for i in range(n)]
    completions = [
        Completion(s.id, exit, "red" if s.kind == "vqa" else text(int(s.id[1:]), exit), (1,), "stop")
        for s in samples
        for exit in exits
    ]
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text(to_lines(samples))
    (folder / "completions.jsonl").write_text(to_lines(completions))
    (folder / "config.json").write_text(json.dumps({"model": "m", "judge": "refusal", "seed": 0}))
    write_plan(folder, len(completions), exits)
    return folder


def write_plan(folder: Path, n_requests: int, exits, n_blocks: int = 3) -> None:
    plan = {"exits": list(exits), "default_exit": n_blocks - 1, "n_blocks": n_blocks, "n_requests": n_requests}
    plan |= {"batch_size": 1, "prefix_tokens": 1, "threads": 1, "model_sha256": "", "skipped": {}}
    (folder / "plan.json").write_text(json.dumps(plan))


class Length:
    """A scorer without weights: the length of the answer over 100; notes what it was given."""

    def __init__(self, version="1", batch_size=4, quantity="toxicity", value=lambda text: len(text) / 100):
        self.info = ScorerInfo("length", "len", version, quantity, ("harmful",))
        self.batch_size, self.value, self.batches = batch_size, value, []

    def key(self, sample, completion):
        return (completion.text,)

    def score(self, batch):
        self.batches.append([completion.text for _, completion in batch])
        return [ScoredAnswer(self.value(completion.text)) for _, completion in batch]


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.glob("scores.*"))}


def pair(text: str):
    return Sample("a", "p", "harmful", ""), Completion("a", 0, text, (1,), "stop")
