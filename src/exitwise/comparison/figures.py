"""Computes what changed between two paired runs: per exit, per band of exits, and per group of exits.

Every difference is AFTER minus BEFORE over the samples that both runs have scored. Groups are the trained, held-out and
other exits of an adapter, the default exit, and all exits.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from ..measure import stats
from ..measure.metrics import clusters_of
from ..measure.readings import METRICS, outcome
from ..model.exit_names import BANDS, band_of
from ..run.exit import Exit
from ..run.records import Kind
from ..run.run import Run
from .changes import (
    AnswerCounts,
    Change,
    Changes,
    ComparedMetric,
    ComparisonFigures,
    ExitChanges,
    MeanChanges,
    MeanValue,
    RunIdentity,
    UnscoredCounts,
)
from .pairing import ComparedRun, RunPair, SampleAtExit

SHARES = {"asr": "ASR", "utility": "Utility", "over_refusal": "Over-refusal", "coherence": "Coherence"}
"""Shares of labels that are compared (measure/readings.py), with their names."""

Direction = Literal["lower", "higher"]
BETTER: dict[str, Direction] = {
    "asr": "lower",
    "utility": "higher",
    "over_refusal": "lower",
    "coherence": "higher",
    "toxicity": "lower",
    "reward": "higher",
    "accuracy": "higher",
}
"""Which direction is good, for the shares and for what scorers measure; other quantities have no direction."""

KINDS: tuple[Kind, ...] = ("harmful", "benign", "vqa")


class PairedValues(NamedTuple):
    """A metric's values in both runs, (S, L) samples by exits, NaN where not scored; clusters of the samples, (S,),
    and of their images where those cross the prompts."""

    metric: ComparedMetric
    before: np.ndarray
    after: np.ndarray
    clusters: list[str]
    crossing: list[str] | None
    exits: tuple[Exit, ...]


def compare_pair(pair: RunPair) -> ComparisonFigures:
    """All figures of the comparison, without a verdict on them (verdict.py)."""
    before, after = pair.before.run, pair.after.run
    metrics = find_metrics(pair)
    tables = {metric.key: _table(pair, metric, scorer) for metric, scorer in metrics.items()}
    n_blocks, seed = after.plan.n_blocks, before.config.seed
    groups = group_exits(pair)
    bands = {band: tuple(exit for exit in pair.exits if band_of(exit, n_blocks) == band) for band in BANDS}
    return ComparisonFigures(
        before=_identity(before),
        after=_identity(after),
        judge=pair.after.judge,
        default_exit=after.plan.default_exit,
        n_blocks=n_blocks,
        seed=seed,
        crossed=tables["asr"].crossing is not None,
        exits=pair.exits,
        adapter_info=pair.info,
        metrics=tuple(metrics),
        answers=AnswerCounts(len(pair.exits) * len(pair.before.samples), _changed_answers(pair)),
        by_exit=_by_exit(pair, tables, groups, n_blocks, seed),
        bands=tuple(MeanChanges(name, exits, _means(tables, exits, seed)) for name, exits in bands.items() if exits),
        groups=tuple(MeanChanges(name, exits, _means(tables, exits, seed)) for name, exits in groups.items()),
        notes=pair.notes,
        caveat=pair.after.caveat,
    )


def find_metrics(pair: RunPair) -> dict[ComparedMetric, str]:
    """{metric: its scorer, "" for a share}: the four shares, then each scorer on each kind of sample that both runs
    have a value for."""
    metrics = {ComparedMetric(key, name, "share", BETTER[key], METRICS[key][0]): "" for key, name in SHARES.items()}
    samples = pair.before.samples
    for scorer, (before, after, quantity) in pair.scores.items():
        scored = {samples[key].kind for key, _ in before.keys() & after if key in samples}
        for kind in (kind for kind in KINDS if kind in scored):
            key = scorer if kind == "harmful" else f"{scorer}.{kind}"
            metrics[ComparedMetric(key, key, "score", BETTER.get(quantity, ""), (kind,))] = scorer
    return metrics


def group_exits(pair: RunPair) -> dict[str, tuple[Exit, ...]]:
    """Trained, held-out and other exits where the adapter says which; the default exit; all. No group is empty."""
    groups: dict[str, tuple[Exit, ...]] = {}
    if pair.info:
        trained, held_out = set(pair.info.exits), set(pair.info.held_out)
        groups["trained"] = tuple(exit for exit in pair.exits if exit in trained)
        groups["held out"] = tuple(exit for exit in pair.exits if exit in held_out)
        groups["other"] = tuple(exit for exit in pair.exits if exit not in trained | held_out)
    groups["default"] = tuple(exit for exit in pair.exits if exit == pair.after.run.plan.default_exit)
    groups["all"] = pair.exits
    return {name: exits for name, exits in groups.items() if exits}


def _identity(run: Run) -> RunIdentity:
    return RunIdentity(str(run.path), run.config.model, run.config.adapter)


def _changed_answers(pair: RunPair) -> int:
    cells = [(key, exit) for key in pair.before.samples for exit in pair.exits]
    return sum(pair.before.texts.get(cell) != pair.after.texts.get(cell) for cell in cells)


# Values


def _table(pair: RunPair, metric: ComparedMetric, scorer: str) -> PairedValues:
    samples = [sample for sample in pair.before.samples.values() if sample.kind in metric.kinds]
    before, after = (
        np.array(
            [[_value(pair, which, metric.key, scorer, (s.id, exit)) for exit in pair.exits] for s in samples],
            dtype=float,
        ).reshape(len(samples), len(pair.exits))
        for which in (0, 1)
    )
    return PairedValues(metric, before, after, *clusters_of(samples), pair.exits)


def _value(pair: RunPair, which: int, name: str, scorer: str, cell: SampleAtExit) -> float:
    if scorer:
        scores = pair.scores[scorer]
        return (scores.before, scores.after)[which].get(cell, float("nan"))
    run = (pair.before, pair.after)[which]
    scored = outcome(name, run.samples[cell[0]], run.readings[cell]) if cell in run.readings else None
    return float("nan") if scored is None else float(scored)


# Figures


def _by_exit(
    pair: RunPair, tables: dict[str, PairedValues], groups: dict[str, tuple[Exit, ...]], n_blocks: int, seed: int
) -> tuple[ExitChanges, ...]:
    belongs = {exit: name for name in ("trained", "held out", "other") for exit in groups.get(name, ())}
    columns = {key: _holm([_at_exit(table, i, seed) for i in range(len(pair.exits))]) for key, table in tables.items()}
    return tuple(
        ExitChanges(
            exit=exit,
            band=band_of(exit, n_blocks),
            group=belongs.get(exit),
            changes={key: column[i] for key, column in columns.items()},
            moves=_moves(pair, exit),
            unscored=UnscoredCounts(_unscored(pair.before, exit), _unscored(pair.after, exit)),
        )
        for i, exit in enumerate(pair.exits)
    )


def _holm(column: list[Change | None]) -> list[Change | None]:
    """One metric at every exit, with the p-values adjusted over the exits."""
    pvalues = {i: change.p for i, change in enumerate(column) if change and isinstance(change.p, float)}
    adjusted = dict(zip(pvalues, stats.holm(list(pvalues.values())), strict=True))
    return [
        replace(change, p_holm=adjusted[i]) if change and i in adjusted else change for i, change in enumerate(column)
    ]


def _at_exit(table: PairedValues, column: int, seed: int) -> Change | None:
    """One metric at one exit over the pairs that both runs have scored; None where there is none."""
    both = ~(np.isnan(table.before[:, column]) | np.isnan(table.after[:, column]))
    before, after = table.before[both, column], table.after[both, column]
    if not len(before):
        return None
    mean = _mean(table, (column,), seed) if table.metric.unit == "score" or table.crossing else None
    if table.metric.unit == "score":
        return mean and replace(mean, n=len(before))
    paired = _paired(before, after)
    limits = mean or paired
    return Change(
        before=stats.wilson(int(before.sum()), len(before)),
        after=stats.wilson(int(after.sum()), len(after)),
        difference=paired.difference,
        low=limits.low,
        high=limits.high,
        gained=paired.gained,
        lost=paired.lost,
        n=len(before),
        p=stats.mcnemar_exact(paired.gained, paired.lost),
    )


def _means(tables: dict[str, PairedValues], exits: Sequence[Exit], seed: int) -> Changes:
    """Each metric's mean over the exits; None where nothing was scored twice."""
    return {key: _mean(table, tuple(table.exits.index(exit) for exit in exits), seed) for key, table in tables.items()}


def _mean(table: PairedValues, columns: tuple[int, ...], seed: int) -> Change | None:
    """Means over the exits of both runs and their difference; None where nothing was scored twice.

    The interval resamples clusters, prompts and images both where they cross. At a single exit where no two samples
    share a cluster there is nothing to gain from that, and Newcombe's interval, that of the exit's own row, holds its
    level better with few samples.
    """
    before, after = table.before[:, columns], table.after[:, columns]
    limits = (-1.0, 1.0) if table.metric.unit == "share" else None
    rng = np.random.default_rng(seed)
    found = stats.paired_cluster_bootstrap(after, before, table.clusters, rng, limits=limits, crossing=table.crossing)
    if found.difference is None:
        return None
    low, high = found.low, found.high
    if limits and len(columns) == 1 and not table.crossing:
        both = ~(np.isnan(before) | np.isnan(after))[:, 0]
        clusters = [cluster for cluster, scored in zip(table.clusters, both, strict=True) if scored]
        if len(set(clusters)) == len(clusters):
            paired = _paired(before[both, 0], after[both, 0])
            low, high = paired.low, paired.high
    return Change(MeanValue(found.second), MeanValue(found.first), found.difference, low, high)


def _paired(before: np.ndarray, after: np.ndarray) -> stats.Difference:
    """Newcombe's difference of outcomes (N,) without NaN, N > 0."""
    paired = stats.paired_difference(after.astype(bool).tolist(), before.astype(bool).tolist())
    assert paired
    return paired


def _moves(pair: RunPair, exit: Exit) -> dict[str, dict[str, int]]:
    """Number of harmful samples by their label before, then by their label after."""
    cells = [(s.id, exit) for s in pair.before.samples.values() if s.kind == "harmful"]
    seen = Counter(
        (pair.before.labels.get(cell, "unscored"), pair.after.labels.get(cell, "unscored")) for cell in cells
    )
    table: dict[str, dict[str, int]] = {}
    for (old, new), count in sorted(seen.items()):
        table.setdefault(old, {})[new] = count
    return table


def _unscored(side: ComparedRun, exit: Exit) -> dict[Kind, int]:
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for sample in side.samples.values():
        counts[sample.kind] += side.labels.get((sample.id, exit), "unscored") == "unscored"
    return counts
