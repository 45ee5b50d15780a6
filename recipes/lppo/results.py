"""Writes the tables of docs/results.md from the runs of run.py: compares every audit with the one before training.

python recipes/lppo/results.py
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from run import AUDIT, COMMON, EARLIER, EXPERIMENTS, WEIGHTS

from exitwise import Comparison, compare
from exitwise.comparison.changes import Change, ExitChanges
from exitwise.run.exit import Exit

PAGE = Path(__file__).parents[2] / "docs/results.md"
LABELS = {
    "l-ppo-8": "L-PPO at exit 8",
    "l-ppo-random": "L-PPO, random exits, kl_coef 0.05",
    "sft-8": "SFT at exit 8",
    "dpo-8": "DPO at exit 8",
    "grpo-8": "GRPO at exit 8",
    "clip-ppo-default": "Clip-PPO at the default exit",
    "l-ppo-8-kl0": "L-PPO at exit 8, kl_coef 0",
    "l-ppo-8-alone": "L-PPO at exit 8, kl_coef 0, harmful prompts alone, twice the learning rate, 16 steps",
    "l-ppo-8-kl0.05": "L-PPO at exit 8, kl_coef 0.05",
    "l-ppo-8-kl0.15": "L-PPO at exit 8, kl_coef 0.15",
    "l-ppo-random-few": "L-PPO, random exits, fewer prompts",
    "l-ppo-8-cost3": "L-PPO at exit 8, fewer prompts, refusal cost 3",
    "l-ppo-8-cost1": "L-PPO at exit 8, fewer prompts",
    "l-ppo-8-cost1-benign": "L-PPO at exit 8, fewer prompts, more harmless ones in the mix",
    "l-ppo-8-short": "L-PPO at exit 8, fewer prompts, 16 steps",
    "l-ppo-8-fast": "L-PPO at exit 8, fast",
    "l-ppo-random-fast": "L-PPO, random exits, fast",
    "sft-8-fast": "SFT at exit 8, fast",
}
METRICS = (("asr", "ASR"), ("utility", "easy-VQA"), ("over_refusal", "over-refusal"), ("coherence", "coherent"))


@dataclass(frozen=True)
class Config:
    work: Path = Path("runs/lppo")
    """Where run.py worked."""


def cell(change: Change | None) -> str:
    """ "81 → 30: -51 (-61 to -39)", in points."""
    if not change:
        return "-"
    before, after = (round(100 * when.value) for when in (change.before, change.after))
    points = [f"{100 * value:+.1f}" for value in (change.difference, change.low, change.high)]
    return f"{before} → {after}: {points[0]} ({points[1]} to {points[2]})"


def rows_of(found: Comparison, name: str) -> list[str]:
    method, seed = name.rsplit(".", 1)
    figures, info = found.figures, found.figures.adapter_info
    names = dict.fromkeys(info.held_out, " (held out)") | dict.fromkeys(info.exits, " (trained)") if info else {}
    rows = []
    for row in figures.by_exit:
        where = names.get(row.exit, " (default)" if row.exit == figures.default_exit else "")
        cells = " | ".join(cell(row.changes[key]) for key, _ in METRICS)
        rows.append(f"| {LABELS[method]} | {seed} | {row.exit}{where} | {cells} |")
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


def over_seeds(compared: dict[str, Comparison]) -> list[str]:
    """Rows of methods that were trained with several seeds: mean and range of each difference, in points."""
    methods: dict[str, list[dict[Exit, ExitChanges]]] = {}
    for name, found in compared.items():
        by_exit = {row.exit: row for row in found.figures.by_exit}
        methods.setdefault(name.rsplit(".", 1)[0], []).append(by_exit)
    rows = []
    for method, runs in methods.items():
        exits = set.intersection(*(set(by_exit) for by_exit in runs))
        for exit in sorted(exits) if len(runs) > 1 else ():
            cells = []
            for key, _ in METRICS:
                points = [100 * by_exit[exit].changes[key].difference for by_exit in runs]
                cells.append(f"{sum(points) / len(points):+.1f} ({min(points):+.1f} to {max(points):+.1f})")
            rows.append(f"| {LABELS[method]} | {len(runs)} | {exit} | {' | '.join(cells)} |")
    return rows


def main(config: Config) -> None:
    names = [*EXPERIMENTS, *WEIGHTS, *EARLIER]
    done = [name for name in names if (config.work / f"{name}-audit/metrics.json").exists()]
    missing = [name for name in names if name not in done]
    compared = {
        name: compare(config.work / "before-audit", audit, out=audit)
        for name in done
        for audit in [config.work / f"{name}-audit"]
    }
    tables = {name: rows_of(found, name) for name, found in compared.items()}
    verdicts = []
    for name, found in compared.items():
        failures = "; ".join(f"{failure.name}: {failure.text}" for failure in found.verdict.failures)
        method, seed = name.rsplit(".", 1)
        verdicts.append(f"- **{LABELS[method]}, seed {seed}.** {found.verdict.sentence} {failures}".rstrip())
    metrics = " | ".join(label for _, label in METRICS)
    head = [f"| method | seed | exit | {metrics} |", "|---|---|---|" + "---|" * len(METRICS)]
    blocks = {
        "table": [*head, *(row for name in done if name in EXPERIMENTS for row in tables[name])],
        "weights": [*head, *(row for name in done if name in WEIGHTS for row in tables[name])],
        "seeds": [head[0].replace("seed", "seeds"), head[1], *over_seeds(compared)],
        "earlier": [*head, *(row for name in done if name in EARLIER for row in tables[name])],
        "verdicts": verdicts,
        "training": [
            "| method | seed | steps | KL | entropy | mean KL of an update | largest | mean TV | surrogate gain | "
            "return did not fall | regret | signatures |",
            "|" + "---|" * 12,
            *(training(config.work, name) for name in done),
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
