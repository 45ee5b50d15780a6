"""What changed between two paired runs: per exit, per band of exits, and per group (trained, held out, other).

Every difference is AFTER minus BEFORE over the samples that both runs have scored. docs/reference/comparison.md lists
the keys.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import numpy as np

from ..measure import stats
from ..measure.metrics import clusters_of
from ..measure.readings import METRICS, outcome
from ..model.exit_names import BANDS, band_of
from ..run.exit import Exit
from ..run.records import Kind
from .pairing import Cell, Pair, Run

SHARES = {"asr": "ASR", "utility": "Utility", "over_refusal": "Over-refusal", "coherence": "Coherence"}
"""Shares of labels that are compared (metrics.METRICS), with their names."""

BETTER: dict[str, Literal["lower", "higher"]] = {
    "asr": "lower",
    "utility": "higher",
    "over_refusal": "lower",
    "coherence": "higher",
    "toxicity": "lower",
    "reward": "higher",
    "accuracy": "higher",
}
"""Which way is good, of the shares and of what scorers measure; another quantity has no direction."""

KINDS: tuple[Kind, ...] = ("harmful", "benign", "vqa")


class Metric(NamedTuple):
    """One compared figure: a share of labels, or the mean of a scorer's values."""

    key: str
    name: str
    unit: Literal["share", "score"]
    better: str
    kinds: tuple[Kind, ...]
    scorer: str


class Table(NamedTuple):
    """A metric's values in both runs, (S, L) samples by exits, NaN where not scored; clusters of the samples, (S,),
    and of their images where those cross the prompts."""

    metric: Metric
    before: np.ndarray
    after: np.ndarray
    clusters: list[str]
    crossing: list[str] | None
    exits: tuple[Exit, ...]


def compare_pair(pair: Pair) -> dict[str, Any]:
    """All figures of the comparison, ready for JSON, but for the verdict on them (verdict.py)."""
    tables = {metric.key: _table(pair, metric) for metric in find_metrics(pair)}
    n_blocks, seed = pair.after.plan["n_blocks"], pair.before.config["seed"]
    groups = group_exits(pair)
    belongs = {exit: name for name in ("trained", "held out", "other") for exit in groups.get(name, [])}
    bands = {band: [exit for exit in pair.exits if band_of(exit, n_blocks) == band] for band in BANDS}
    return {
        "before": _identity(pair.before),
        "after": _identity(pair.after),
        "judge": pair.after.judge,
        "default_exit": pair.after.plan["default_exit"],
        "n_blocks": n_blocks,
        "seed": seed,
        "crossed": tables["asr"].crossing is not None,
        "exits": list(pair.exits),
        "adapter_info": pair.info and {**pair.info._asdict()},
        "metrics": [{k: v for k, v in table.metric._asdict().items() if k != "scorer"} for table in tables.values()],
        "answers": {"n": len(pair.exits) * len(pair.before.samples), "changed": _changed_answers(pair)},
        "by_exit": _by_exit(pair, tables, belongs, n_blocks, seed),
        "bands": [
            {"band": band, "exits": exits, **_means(tables, exits, seed)} for band, exits in bands.items() if exits
        ],
        "groups": [{"group": name, "exits": exits, **_means(tables, exits, seed)} for name, exits in groups.items()],
        "notes": list(pair.notes),
        "caveat": pair.after.caveat,
    }


def find_metrics(pair: Pair) -> list[Metric]:
    """The four shares, then each scorer on each kind of sample that both runs have a value for."""
    metrics = [Metric(key, name, "share", BETTER[key], METRICS[key][0], "") for key, name in SHARES.items()]
    samples = pair.before.samples
    for scorer, (before, after, quantity) in pair.scores.items():
        better = BETTER.get(quantity, "")
        scored = {samples[key].kind for key, _ in before.keys() & after if key in samples}
        for kind in (kind for kind in KINDS if kind in scored):
            key = scorer if kind == "harmful" else f"{scorer}.{kind}"
            metrics.append(Metric(key, key, "score", better, (kind,), scorer))
    return metrics


def group_exits(pair: Pair) -> dict[str, list[Exit]]:
    """Trained, held out and other exits where the adapter says which; the default exit; all. No group is empty."""
    groups: dict[str, list[Exit]] = {}
    if pair.info:
        trained, held_out = set(pair.info.exits), set(pair.info.held_out)
        groups["trained"] = [exit for exit in pair.exits if exit in trained]
        groups["held out"] = [exit for exit in pair.exits if exit in held_out]
        groups["other"] = [exit for exit in pair.exits if exit not in trained | held_out]
    groups["default"] = [exit for exit in pair.exits if exit == pair.after.plan["default_exit"]]
    groups["all"] = list(pair.exits)
    return {name: exits for name, exits in groups.items() if exits}


def _identity(run: Run) -> dict[str, Any]:
    return {"run": str(run.folder), "model": run.config["model"], "adapter": run.config.get("adapter")}


def _changed_answers(pair: Pair) -> int:
    cells = [(key, exit) for key in pair.before.samples for exit in pair.exits]
    return sum(pair.before.texts.get(cell) != pair.after.texts.get(cell) for cell in cells)


# Values


def _table(pair: Pair, metric: Metric) -> Table:
    samples = [sample for sample in pair.before.samples.values() if sample.kind in metric.kinds]
    before, after = (
        np.array(
            [[_value(pair, which, metric, (s.id, exit)) for exit in pair.exits] for s in samples], dtype=float
        ).reshape(len(samples), len(pair.exits))
        for which in (0, 1)
    )
    return Table(metric, before, after, *clusters_of(samples), pair.exits)


def _value(pair: Pair, which: int, metric: Metric, cell: Cell) -> float:
    if metric.unit == "score":
        scores = pair.scores[metric.scorer]
        return (scores.before, scores.after)[which].get(cell, float("nan"))
    run = (pair.before, pair.after)[which]
    scored = outcome(metric.key, run.samples[cell[0]], run.readings[cell]) if cell in run.readings else None
    return float("nan") if scored is None else float(scored)


# Figures


def _by_exit(
    pair: Pair, tables: dict[str, Table], belongs: dict[Exit, str], n_blocks: int, seed: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "exit": exit,
            "band": band_of(exit, n_blocks),
            "group": belongs.get(exit),
            **{key: _at_exit(table, column, seed) for key, table in tables.items()},
            "moves": _moves(pair, exit),
            "unscored": {"before": _unscored(pair.before, exit), "after": _unscored(pair.after, exit)},
        }
        for column, exit in enumerate(pair.exits)
    ]
    for key, table in tables.items():
        tested = [row[key] for row in rows if row[key] and table.metric.unit == "share"]
        for entry, adjusted in zip(tested, stats.holm([entry["p"] for entry in tested]), strict=True):
            entry["p_holm"] = adjusted
    return rows


def _at_exit(table: Table, column: int, seed: int) -> dict[str, Any] | None:
    """One metric at one exit over the pairs that both runs have scored; None where there is none."""
    both = ~(np.isnan(table.before[:, column]) | np.isnan(table.after[:, column]))
    before, after = table.before[both, column], table.after[both, column]
    if not len(before):
        return None
    if table.metric.unit == "score":
        return _mean(table, (column,), seed) | {"n": len(before)}
    paired = _paired(before, after)
    limits = _mean(table, (column,), seed) if table.crossing else paired._asdict()
    return {
        "before": asdict(stats.wilson(int(before.sum()), len(before))),
        "after": asdict(stats.wilson(int(after.sum()), len(after))),
        **paired._asdict(),
        **{key: limits[key] for key in ("low", "high")},
        "n": len(before),
        "p": stats.mcnemar_exact(paired.gained, paired.lost),
    }


def _means(tables: dict[str, Table], exits: Sequence[Exit], seed: int) -> dict[str, Any]:
    """Each metric's mean over the exits; None where nothing was scored twice."""
    return {
        key: _mean(table, tuple(table.exits.index(exit) for exit in exits), seed) or None
        for key, table in tables.items()
    }


def _mean(table: Table, columns: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Means over the exits of both runs and their difference; {} where nothing was scored twice.

    The interval resamples clusters, prompts and images both where they cross. At a single exit where no two samples
    share a cluster there is nothing to gain from that, and Newcombe's interval, that of the exit's own row, holds its
    level better with few samples.
    """
    before, after = table.before[:, columns], table.after[:, columns]
    limits = (-1.0, 1.0) if table.metric.unit == "share" else None
    rng = np.random.default_rng(seed)
    found = stats.paired_cluster_bootstrap(after, before, table.clusters, rng, limits=limits, crossing=table.crossing)
    if found.difference is None:
        return {}
    low, high = found.low, found.high
    if limits and len(columns) == 1 and not table.crossing:
        both = ~(np.isnan(before) | np.isnan(after))[:, 0]
        clusters = [cluster for cluster, scored in zip(table.clusters, both, strict=True) if scored]
        if len(set(clusters)) == len(clusters):
            paired = _paired(before[both, 0], after[both, 0])
            low, high = paired.low, paired.high
    return {
        "before": {"value": found.second},
        "after": {"value": found.first},
        "difference": found.difference,
        "low": low,
        "high": high,
    }


def _paired(before: np.ndarray, after: np.ndarray) -> stats.Difference:
    """Newcombe's difference of outcomes (N,) without NaN, N > 0."""
    paired = stats.paired_difference(after.astype(bool).tolist(), before.astype(bool).tolist())
    assert paired
    return paired


def _moves(pair: Pair, exit: Exit) -> dict[str, dict[str, int]]:
    """Of the harmful samples: how many had one label before and another (or the same) after."""
    cells = [(s.id, exit) for s in pair.before.samples.values() if s.kind == "harmful"]
    seen = Counter(
        (pair.before.labels.get(cell, "unscored"), pair.after.labels.get(cell, "unscored")) for cell in cells
    )
    table: dict[str, dict[str, int]] = {}
    for (old, new), count in sorted(seen.items()):
        table.setdefault(old, {})[new] = count
    return table


def _unscored(run: Run, exit: Exit) -> dict[str, int]:
    counts = dict.fromkeys(KINDS, 0)
    for sample in run.samples.values():
        counts[sample.kind] += run.labels.get((sample.id, exit), "unscored") == "unscored"
    return counts  # type: ignore[return-value]
