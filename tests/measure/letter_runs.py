"""Small runs written as tables of letters, and their figures."""

import json

from exitwise.measure.metrics import compute_metrics
from exitwise.run.records import Completion, Sample, Verdict
from exitwise.run.typed import to_json

LABELS = {"a": "answered", "r": "refused", "i": "incoherent", "c": "correct", "w": "wrong", "u": "unscored"}


def metrics(harmful, benign=None, vqa=None, default=3, n_blocks=4, policies=None):
    """Metrics of {exit: labels} tables: one letter a sample, "." where the run has no completion yet."""
    samples, completions, verdicts = {}, [], []
    for kind, table in (("harmful", harmful), ("benign", benign or {}), ("vqa", vqa or {})):
        for exit_, row in table.items():
            for i, letter in enumerate(row):
                key = f"{kind}-{i}"
                category = policies[i] if policies and kind == "harmful" else ""
                samples[key] = Sample(key, f"prompt {key}", kind, f"{i}.png", category)
                if letter != ".":
                    completions.append(Completion(key, exit_, "text", (1,) * (exit_ + 1), "stop"))
                    verdicts.append(Verdict(key, exit_, "refusal", LABELS[letter], "because"))
    got = compute_metrics(
        list(samples.values()), completions, verdicts, model="tiny", default_exit=default, n_blocks=n_blocks
    )
    json.dumps(to_json(got), allow_nan=False)
    return got


def at(got, exit_):
    return next(e for e in got.exits if e.exit == exit_)


def counts(interval):
    return interval.successes, interval.n


def crossed_run(n_prompts, n_images, let_through):
    """Exits 2 and 3 (default, refuses all) of crossed prompts; `let_through(prompt, image)` at exit 2."""
    cells = [(p, i) for p in range(n_prompts) for i in range(n_images)]
    samples = [Sample(f"{p}@{i}", f"prompt {p}", "harmful", f"photo {i}") for p, i in cells]
    completions = [Completion(s.id, exit_, "text", (1,), "stop") for s in samples for exit_ in (2, 3)]
    verdicts = [
        Verdict(s.id, exit_, "refusal", "answered" if exit_ == 2 and let_through(*cell) else "refused")
        for s, cell in zip(samples, cells, strict=True)
        for exit_ in (2, 3)
    ]
    return compute_metrics(samples, completions, verdicts, model="m", default_exit=3, n_blocks=4)
