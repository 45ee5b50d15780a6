"""Finished run directories made of letters, one a sample: what `exitwise audit` leaves, without a model."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exitwise.auditing.config import AuditConfig
from exitwise.run.records import Completion, Sample, Verdict

LABELS = {"a": "answered", "r": "refused", "i": "incoherent", "c": "correct", "w": "wrong", "u": "unscored"}
Letters = Mapping[int, str]
"""By exit, one letter a sample."""


def write_run(
    folder: Path,
    harmful: Letters,
    benign: Letters | None = None,
    vqa: Letters | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    scores: Mapping[str, Mapping[tuple[str, int], float | None]] | None = None,
    answer: str = "an answer",
) -> Path:
    """A run of 4 blocks whose default exit is 3.

    Args:
        config, plan: other values of config.json and plan.json.
        change: other fields by sample id.
        scores: by scorer, values by (sample id, exit).
        answer: said wherever the letter is an `a`; other texts follow the letters.
    """
    samples, completions, verdicts = {}, [], []
    for kind, table in (("harmful", harmful), ("benign", benign or {}), ("vqa", vqa or {})):
        for exit, row in table.items():
            for i, letter in enumerate(row):
                key = f"{kind}-{i}"
                fields = {"prompt": f"prompt {key}", "image": f"{i}.png", "answers": ("red",) if kind == "vqa" else ()}
                samples[key] = Sample(**{"id": key, "kind": kind, **fields, **(change or {}).get(key, {})})
                text = answer if letter == "a" else LABELS[letter]
                completions.append(Completion(samples[key].id, exit, text, (1, 2), "stop"))
                verdicts.append(Verdict(samples[key].id, exit, "refusal", LABELS[letter], "because"))  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    defaults = AuditConfig("tiny").to_json()
    write(folder / "config.json", {**defaults, "images_sha256": "0", **(config or {})})
    found = {"n_requests": len(completions), "default_exit": 3, "n_blocks": 4, "model_sha256": str(folder)}
    write(folder / "plan.json", {**found, **(plan or {})})
    write(folder / "metrics.json", {"caveat": "This judge <matches> strings."})
    write(folder / "env.json", {"device": "cpu", "dtype": "float32"})
    for name, records in (
        ("samples", samples.values()),
        ("completions", completions),
        ("verdicts.refusal", verdicts),
    ):
        (folder / f"{name}.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    for scorer, values in (scores or {}).items():
        rows = [
            {"sample": sample, "exit": exit, "scorer": scorer, "value": value, "reason": ""}
            for (sample, exit), value in values.items()
        ]
        (folder / f"scores.{scorer}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def letters(shares: Mapping[int, float], n: int, yes: str, no: str, seed: int) -> dict[int, str]:
    """Random letters with these shares of `yes` at each exit."""
    rng = random.Random(seed)
    return {exit: "".join(yes if rng.random() < share else no for _ in range(n)) for exit, share in shares.items()}
