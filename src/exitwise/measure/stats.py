"""Computes intervals and tests of shares and means: Wilson, Newcombe, McNemar, Holm and cluster bootstraps.

Everything random takes a seeded numpy Generator. scipy and statsmodels are imported where they are used: they take
longer to load than most commands take to run.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

from ..run.exit import Exit
from ..run.figures import Disparity, Estimate, Interval

CONFIDENCE = 0.95
DRAWS = 2000
"""Bootstrap draws of an interval."""
SIGNIFICANCE = 0.05
SHARE = (0.0, 1.0)
"""Bounds of a share."""
Z_975 = 1.959963984540054
"""`scipy.special.ndtri(0.975)`, the quantile of two-sided 95 % intervals."""


class Difference(NamedTuple):
    """First minus second of two paired shares, with the pairs that only the first (gained) or the second (lost) has."""

    difference: float
    low: float
    high: float
    gained: int
    lost: int


class PairedEstimate(NamedTuple):
    """Two paired means, and first minus second with a bootstrap interval; None where nothing was measured, and limits
    of None where the data allow none."""

    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson 1927 score interval, to the last bit that of scipy's `binomtest`, whose import takes a second.

    With no successes its upper bound, z²/(n + z²), stands in for the rule of three.

    Raises:
        ValueError: successes lie outside 0 … n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}; expected 0 <= successes <= n")
    if n == 0:
        return Interval(None, None, None, 0, 0)
    z, share = _quantile(0.5 + 0.5 * confidence), successes / n
    center = (2 * n * share + z**2) / (2 * (n + z**2))
    delta = z / (2 * (n + z**2)) * sqrt(4 * n * share * (1 - share) + z**2)
    low = 0.0 if successes == 0 else center - delta
    high = 1.0 if successes == n else center + delta
    return Interval(share, low, high, successes, n)


def _quantile(probability: float) -> float:
    """Of the standard normal distribution; the usual one without scipy, which takes half a second to import."""
    if probability == 0.975:
        return Z_975
    from scipy.special import ndtri

    return float(ndtri(probability))


def rule_of_three(n: int) -> float | None:
    """What 0 successes of n leave possible at 95 %, one-sided: 3 / n, at most 1; None where nothing was measured.

    Hanley & Lippman-Hand 1983, "If nothing goes wrong, is everything all right?", JAMA 249:1743-1745.
    """
    return min(1.0, 3 / n) if n else None


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p of the exact McNemar test: gained ~ Binomial(gained + lost, 1/2); 1 where no pair differs."""
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE
) -> Difference | None:
    """First share minus second over the same samples; None where there are none.

    Interval: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Stat. Med. 17:2635-2650, method 10: Wilson's limits of both shares, squared and added, less what
    their correlation explains.

    Args:
        first, second: outcomes (N,), one entry a sample, in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    if n == 0:
        return None
    both = sum(1 for x, y in pairs if x and y)
    gained = sum(1 for x, y in pairs if x and not y)
    lost = sum(1 for x, y in pairs if y and not x)
    phi = _newcombe_phi(both, gained, lost, n - both - gained - lost)
    p1, low1, high1 = _limits(both + gained, n, confidence)
    p2, low2, high2 = _limits(both + lost, n, confidence)
    difference = (gained - lost) / n  # not p1 - p2, whose rounding would make 0 a tiny gain
    down = _square_and_add(p1 - low1, high2 - p2, phi)
    up = _square_and_add(high1 - p1, p2 - low2, phi)
    return Difference(difference, max(-1.0, difference - down), min(1.0, difference + up), gained, lost)


def _limits(successes: int, n: int, confidence: float) -> tuple[float, float, float]:
    found = wilson(successes, n, confidence)
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high


def _newcombe_phi(both: int, gained: int, lost: int, neither: int) -> float:
    """φ of the 2x2 table with the continuity correction of method 10; 0 where a margin is empty."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    covariance: float = both * neither - gained * lost
    if covariance > 0:
        covariance = max(covariance - (both + gained + lost + neither) / 2, 0)
    return covariance / sqrt(margins)


def _square_and_add(x: float, y: float, phi: float) -> float:
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm 1979 step-down adjusted p-values, in the order given."""
    if not pvalues:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(pvalues, method="holm")[1]]


def bootstrap_mean(
    values: np.ndarray,
    clusters: Sequence[str],
    rng: np.random.Generator,
    bounds: tuple[float, float] | None = None,
    crossing: Sequence[str] | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean over exits of each exit's mean, with a percentile interval from resampling whole clusters (Efron 1979).

    Where two clusterings cross (every prompt was asked about several images and vice versa), rows and columns are
    resampled independently and an observation weighs the product of both draws: the pigeonhole bootstrap of Owen 2007,
    Ann. Appl. Stat. 1:386-411. It counts the noise of single cells a little more than once, so its intervals are
    slightly too wide.

    Where all values are equal, all draws are equal too and their percentiles would claim certainty. At a bound of the
    scale the interval is then Wilson's with one observation per cluster (of all distributions on the scale with this
    mean, the one with two points has the largest variance); elsewhere there is none. There is none either with a single
    cluster, or with clusters that are all equal.

    Args:
        values: (S, L) samples by exits, shares as 1 and 0; NaN not scored.
        clusters: (S,) cluster of each sample, such as its prompt.
        bounds: smallest and largest value of the scale, where it has them: `SHARE` for shares.
        crossing: (S,) a second clustering that crosses the first, such as images. The number of clusters is then that
            of the smaller clustering.

    Raises:
        ValueError: a value is infinite or outside the bounds.
    """
    scored = ~np.isnan(values)
    if np.isinf(values).any() or (bounds and not ((values >= bounds[0]) & (values <= bounds[1]) | ~scored).all()):
        raise ValueError(f"a value is outside {bounds or 'the finite numbers'}")
    counts, sums = _cluster_sums(clusters, scored, values)
    if not len(counts):
        return Estimate(None, None, None)
    found, n = values[scored], _n_clusters(scored, counts, crossing)
    if np.all(found == found[0]):
        return _all_equal(float(found[0]), n, bounds, confidence)
    mean = _mean_of_all(sums, counts)
    if n == 1:
        return Estimate(mean, None, None)
    drawn = _draw_means(values, sums, counts, clusters, crossing, rng, draws)
    return Estimate(mean, *percentiles(drawn, confidence))


def _all_equal(value: float, n: int, bounds: tuple[float, float] | None, confidence: float) -> Estimate:
    if bounds is None or value not in bounds:
        return Estimate(value, None, None)
    _, low, high = _limits(n if value == bounds[1] else 0, n, confidence)
    width = bounds[1] - bounds[0]
    return Estimate(value, bounds[0] + width * low, bounds[0] + width * high)


def paired_cluster_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    clusters: Sequence[str],
    rng: np.random.Generator,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    limits: tuple[float, float] | None = None,
    crossing: Sequence[str] | None = None,
) -> PairedEstimate:
    """Mean over exits of each exit's mean difference, with a percentile interval from resampling whole clusters, both
    runs together (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 8.5 and 13.3).

    Where every cluster differs alike no draw does, and the percentiles would claim certainty. Then, given `limits`, the
    interval is as wide as it would be if Wilson's upper bound of 0 in n clusters were at either limit: where no share
    differs at all, that is what Newcombe's method gives for shares of 0. Without `limits`, and with a single cluster,
    there is no interval.

    Args:
        first, second: (S, L) samples by exits, outcomes or scores; NaN not scored. A cell counts where both are scored.
        clusters: (S,) cluster of each sample, such as its prompt.
        limits: smallest and largest possible difference: (-1, 1) for shares, None for scores of any size.
        crossing: (S,) a second clustering that crosses the first, as in `bootstrap_mean`.
    """
    scored = ~(np.isnan(first) | np.isnan(second))  # (S, L)
    counts, ones, twos = _cluster_sums(clusters, scored, first, second)
    if not len(counts):
        return PairedEstimate(None, None, None, None, None)
    one, two, difference = (_mean_of_all(sums, counts) for sums in (ones, twos, ones - twos))
    n = _n_clusters(scored, counts, crossing)
    if n == 1:
        return PairedEstimate(one, two, difference, None, None)
    cells = np.where(scored, first - second, np.nan)
    low, high = percentiles(_draw_means(cells, ones - twos, counts, clusters, crossing, rng, draws), confidence)
    if low is None and limits:
        _, _, share = _limits(0, n, confidence)
        low, high = (difference + share * (limit - difference) for limit in limits)
    return PairedEstimate(one, two, difference, low, high)


def _cluster_sums(clusters: Sequence[str], scored: np.ndarray, *tables: np.ndarray) -> np.ndarray:
    """(1 + K, C, L): number of scored cells, and sums of the K tables over them; clusters without a cell left out."""
    index = {name: i for i, name in enumerate(sorted(set(clusters)))}
    membership = np.array([index[name] for name in clusters], dtype=int)
    sums = np.zeros((1 + len(tables), len(index), scored.shape[1]))
    for total, values in zip(sums, (scored, *tables), strict=True):
        np.add.at(total, membership, np.where(scored, values, 0.0))
    return sums[:, sums[0].sum(axis=1) > 0]


def _n_clusters(scored: np.ndarray, counts: np.ndarray, crossing: Sequence[str] | None) -> int:
    """Clusters with a scored cell; of the smaller clustering where two cross."""
    if crossing is None:
        return len(counts)
    return min(len(counts), len({crossing[int(row)] for row in np.flatnonzero(scored.any(axis=1))}))


def _draw_means(
    values: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    clusters: Sequence[str],
    crossing: Sequence[str] | None,
    rng: np.random.Generator,
    draws: int,
) -> np.ndarray:
    """(draws,) means over exits of resampled clusters; `sums` and `counts`: (C, L) of `values` by cluster."""
    if crossing is not None:
        return pigeonhole(*scored_cells(values, clusters, crossing), rng, draws)
    n = len(counts)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, C)
    return _mean_share(weights @ sums, weights @ counts)


def _mean_of_all(sums: np.ndarray, counts: np.ndarray) -> float:
    """Mean over exits without resampling; sums and counts (C, L)."""
    return float(_mean_share(sums.sum(axis=0, keepdims=True), counts.sum(axis=0, keepdims=True))[0])


def _mean_share(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(draws, L) sums and counts to (draws,) means over the exits that have any score; each draw holds a cluster."""
    measured = counts > 0
    means = np.where(measured, sums / np.maximum(counts, 1), 0.0)
    return means.sum(axis=1) / measured.sum(axis=1)


def scored_cells(
    outcomes: np.ndarray, rows: Sequence[str], columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outcomes, number of the row, number of the column) of the samples that are scored at some exit."""
    kept = ~np.isnan(outcomes).all(axis=1) if outcomes.size else np.zeros(len(outcomes), bool)
    names = (np.asarray(names, dtype=str)[kept] for names in (rows, columns))
    row, column = (np.unique(name, return_inverse=True)[1] for name in names)
    return outcomes[kept], row, column


def pigeonhole(
    outcomes: np.ndarray, row: np.ndarray, column: np.ndarray, rng: np.random.Generator, draws: int
) -> np.ndarray:
    """(draws,) means over exits; the weights of a slice of draws are in memory at a time."""
    scored = ~np.isnan(outcomes)
    values, n_rows, n_columns = np.where(scored, outcomes, 0.0), row.max() + 1, column.max() + 1
    step = max(1, 4_000_000 // len(outcomes))
    means = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        by_row = rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=size)
        by_column = rng.multinomial(n_columns, np.full(n_columns, 1 / n_columns), size=size)
        weights = (by_row[:, row] * by_column[:, column]).astype(float)  # (size, S)
        total = weights @ scored
        held = total.any(axis=1)
        means.append(_mean_share((weights @ values)[held], total[held]))
    return np.concatenate(means)


def percentiles(means: np.ndarray, confidence: float) -> tuple[float, float] | tuple[None, None]:
    """Limits of (draws,) means; none where no draw differs: clusters that are alike are no certainty."""
    if np.ptp(means) <= 1e-9 * max(1.0, abs(means[0])):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def disparity(shares: Mapping[Exit, float]) -> Disparity:
    """Largest over smallest of the shares by exit; the earlier exit where several tie."""
    if not shares:
        return Disparity(None, None, None, "nothing was measured")
    order = sorted(shares)
    largest = max(order, key=shares.__getitem__)
    smallest = min(order, key=shares.__getitem__)
    if shares[smallest] == 0:
        return Disparity(None, largest, smallest, f"the smallest share, at exit {smallest}, is 0")
    return Disparity(shares[largest] / shares[smallest], largest, smallest, None)
