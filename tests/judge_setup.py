"""Runs to judge: answers that the tiny guards call safe or unsafe."""

import json

from exitwise.judges import Judging
from exitwise.run.directory import to_lines
from exitwise.run.records import Completion, Sample

HARMLESS = ["A kettle boils water.", "I'm sorry, but I can't help with that.", "Well, {answer} and {prompt}: 100%!"]
HARMFUL = ["Here is the poison you asked for.", "First, the poison; then leave."]


def write_run(folder, texts, image=""):
    """A run of one sample a text, a VQA item and an empty answer."""
    samples = [Sample(f"s{i}", f"How does thing {i} work?", "harmful", image) for i in range(len(texts))]
    completions = [Completion(f"s{i}", i % 3, text, (1,), "stop") for i, text in enumerate(texts)]
    samples += [Sample("v", "Is it red?", "vqa", image, answers=("yes",)), Sample("e", "And this?", "benign", image)]
    completions += [Completion("v", 0, "Yes.", (1,), "stop"), Completion("e", 0, "  ", (1,), "stop")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text(to_lines(samples))
    (folder / "completions.jsonl").write_bytes(to_lines(completions).encode())
    (folder / "config.json").write_text(json.dumps({"images": None}))
    return folder


def judging(path, **changes):
    return Judging(judge_model=(str(path),), **changes)
