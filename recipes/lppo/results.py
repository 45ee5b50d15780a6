"""Writes docs/results.md from what run.py left: compares every audit with the one before training, row by row.

python recipes/lppo/results.py
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from run import AUDIT, COMMON, EXPERIMENTS

from exitwise.compare import compare_runs

PAGE = Path(__file__).parents[2] / "docs/results.md"
LABELS = {
    "l-ppo-8": "L-PPO at exit 8",
    "l-ppo-random": "L-PPO, random exits",
    "sft-8": "SFT at exit 8",
    "dpo-8": "DPO at exit 8",
    "grpo-8": "GRPO at exit 8",
    "clip-ppo-default": "Clip-PPO at the default exit",
    "l-ppo-8-kl0": "L-PPO at exit 8, kl_coef 0",
    "l-ppo-8-cost1": "L-PPO at exit 8, refusal cost 1",
    "l-ppo-8-cost1-benign": "the same, more harmless prompts",
    "l-ppo-8-short": "L-PPO at exit 8, refusal cost 1, 16 steps",
    "l-ppo-8-fast": "L-PPO at exit 8, fast",
    "l-ppo-random-fast": "L-PPO, random exits, fast",
    "sft-8-fast": "SFT at exit 8, fast",
}
METRICS = (("asr", "ASR"), ("utility", "easy-VQA"), ("over_refusal", "over-refusal"), ("coherence", "coherent"))


@dataclass(frozen=True)
class Config:
    work: Path = Path("runs/lppo")
    """Where run.py worked."""


def cell(entry: dict[str, Any] | None) -> str:
    """ "81 → 30: -51 (-61 to -39)", in points."""
    if not entry:
        return "-"
    before, after = (round(100 * entry[when]["value"]) for when in ("before", "after"))
    points = [f"{100 * entry[key]:+.1f}" for key in ("difference", "low", "high")]
    return f"{before} → {after}: {points[0]} ({points[1]} to {points[2]})"


def rows_of(figures: dict[str, Any], name: str) -> list[str]:
    method, seed = name.rsplit(".", 1)
    info = figures["adapter_info"] or {"exits": [], "held_out": []}
    names = {exit: " (held out)" for exit in info["held_out"]} | {exit: " (trained)" for exit in info["exits"]}
    rows = []
    for row in figures["by_exit"]:
        where = names.get(row["exit"], " (default)" if row["exit"] == figures["default_exit"] else "")
        cells = " | ".join(cell(row[key]) for key, _ in METRICS)
        rows.append(f"| {LABELS[method]} | {seed} | {row['exit']}{where} | {cells} |")
    return rows


def training(work: Path, name: str) -> str:
    """A row on the training itself: from metrics.jsonl and regret.json."""
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    last = lines[-3:]
    mean = lambda key: (lambda v: sum(v) / len(v) if v else None)([r[key] for r in last if r.get(key) is not None])
    show = lambda value, form: "-" if value is None else format(value, form)
    kept = [r["theory/return_after"] >= r["theory/return_before"] for r in lines if "theory/return_after" in r]
    named = sorted({s for r in lines for s in r["signatures"]}) or ["none"]
    regret_path = work / name / "regret.json"
    regret = json.loads(regret_path.read_text()) if regret_path.exists() else None
    method, seed = name.rsplit(".", 1)
    largest = max((row["theory/max_kl"] for row in lines if "theory/max_kl" in row), default=None)
    cells = [
        LABELS[method], seed, str(len(lines)),
        show(mean("objective/kl"), ".2f"), show(mean("policy/entropy_avg"), ".2f"),
        show(mean("theory/mean_kl"), ".3f"), show(largest, ".1f"),
        show(mean("theory/mean_tv"), ".3f"), show(mean("theory/surrogate_gain"), "+.3f"),
        f"{sum(kept)} of {len(kept)}" if kept else "-",
        f"{regret['regret_before']:.2f} → {regret['regret_after']:.2f}" if regret else "-", ", ".join(named),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(config: Config) -> None:
    tables: list[str] = []
    verdicts, trainings, missing = [], [], []
    for name in EXPERIMENTS:
        audit = config.work / f"{name}-audit"
        if not (audit / "metrics.json").exists():
            missing.append(name)
            continue
        figures = compare_runs(config.work / "before-audit", audit, audit)
        tables += rows_of(figures, name)
        failures = "; ".join(f"{f['name']}: {f['text']}" for f in figures["verdict"]["failures"])
        method, seed = name.rsplit(".", 1)
        verdicts.append(f"- **{LABELS[method]}, seed {seed}.** {figures['verdict']['sentence']} {failures}".rstrip())
        trainings.append(training(config.work, name))
    head = " | ".join(label for _, label in METRICS)
    blocks = {
        "table": [f"| method | seed | exit | {head} |", "|---|---|---|" + "---|" * len(METRICS), *tables],
        "verdicts": verdicts,
        "training": [
            "| method | seed | steps | KL | entropy | mean KL of an update | largest | mean TV | surrogate gain | "
            "return did not fall | regret | signatures |",
            "|" + "---|" * 12,
            *trainings,
        ],
        "settings": [f"Common settings: `{COMMON}`; audits: `{AUDIT}`."],
        "missing": [
            f"Not run: {', '.join(missing)}." if missing else "Every experiment of the recipe is in the tables."
        ],
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, t=lines: m[1] + "\n".join(t) + "\n" + m[2],
            page,
            flags=re.S,
        )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
