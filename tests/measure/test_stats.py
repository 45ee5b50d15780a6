"""Statistics against hand-worked numbers, published examples and their own invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from exitwise.measure.stats import (
    cluster_bootstrap,
    disparity,
    holm,
    mcnemar_exact,
    paired_cluster_bootstrap,
    paired_difference,
    pigeonhole,
    rule_of_three,
    two_way_cluster_bootstrap,
    wilson,
)

relaxed = settings(deadline=None)  # the first call imports scipy; other work may hold the cores


@st.composite
def counts(draw):
    n = draw(st.integers(1, 300))
    return draw(st.integers(0, n)), n


def vectors(both, gained, lost, neither):
    """The two paired vectors of a 2x2 table."""
    first = [True] * (both + gained) + [False] * (lost + neither)
    second = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return first, second


def test_wilson_by_hand():
    # Newcombe 1998, Stat. Med. 17:857-872, table I: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson(successes, n)
        assert interval.value == successes / n
        assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert interval[3:] == (successes, n)


@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_wilson_is_scipy_s_to_the_last_bit(confidence):
    for n in (1, 2, 7, 48, 263, 2000):
        for successes in {0, 1, n // 3, n // 2, n - 1, n}:
            expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
            assert wilson(successes, n, confidence)[1:3] == (expected.low, expected.high)


def test_wilson_of_nothing_is_nothing():
    assert wilson(0, 0) == (None, None, None, 0, 0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (1, 0)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


@relaxed
@given(counts())
def test_wilson_holds_its_value_and_mirrors(case):
    successes, n = case
    interval, mirror = wilson(successes, n), wilson(n - successes, n)
    assert -1e-12 <= interval.low <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.high <= 1 + 1e-12
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-9)
    wide = wilson(successes, n, 0.99)
    assert wide.low <= interval.low + 1e-12
    assert wide.high >= interval.high - 1e-12


def test_no_successes():
    # z² / (n + z²) with z² = 3.8415; the one-sided rule of three gives less
    assert wilson(0, 48).high == pytest.approx(3.8415 / 51.8415, abs=1e-5)


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_exact(1, 7) == pytest.approx(2 * (1 + 8) / 256)  # Fagerland et al. 2013: 0.0703
    assert mcnemar_exact(3, 3) == 1.0


@relaxed
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_symmetric(gained, lost):
    assert mcnemar_exact(gained, lost) == pytest.approx(mcnemar_exact(lost, gained))
    assert 0 < mcnemar_exact(gained, lost) <= 1


@pytest.mark.parametrize(
    ("table", "difference", "low", "high"),
    [
        # Altman, Machin, Bryant & Gardner 2000, "Statistics with Confidence", p. 52 (Newcombe's method)
        ((14, 5, 0, 22), 0.122, 0.011, 0.226),
        # Fagerland, Lydersen & Laake 2014, Stat. Med. 33:2850-2875, table II (airway hyper-responsiveness)
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
    ],
)
def test_paired_difference_meets_published_examples(table, difference, low, high):
    got = paired_difference(*vectors(*table))
    assert got[:3] == (pytest.approx(difference, abs=5e-4), pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    assert got[3:] == table[1:3]


def test_paired_difference_of_nothing_and_of_unequal_lengths():
    assert paired_difference([], []) is None
    with pytest.raises(ValueError, match="zip"):
        paired_difference([True], [])


def test_paired_difference_where_nothing_differs():
    got = paired_difference(*vectors(0, 0, 0, 48))
    assert got[0] == 0
    assert got.high == pytest.approx(wilson(0, 48).high)
    assert got.low == -got.high


@relaxed
@given(*[st.integers(0, 40)] * 4)
def test_paired_difference_holds_its_value_and_mirrors(both, gained, lost, neither):
    first, second = vectors(both, gained, lost, neither)
    got = paired_difference(first, second)
    if got is None:
        assert not first
        return
    assert -1 <= got.low <= got.difference <= got.high <= 1
    mirror = paired_difference(second, first)
    assert (got.low, got.high) == (pytest.approx(-mirror.high), pytest.approx(-mirror.low))


def test_holm_by_hand():
    # sorted .01 .03 .04 -> .03 .06 max(.06, .04)
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


@settings(relaxed, max_examples=20)  # statsmodels takes 40 ms a call
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_only_raises_and_keeps_the_order(pvalues):
    adjusted = holm(pvalues)
    assert all(p <= q + 1e-12 <= 1 + 1e-9 for p, q in zip(pvalues, adjusted, strict=True))
    order = np.argsort(pvalues)
    assert np.all(np.diff(np.array(adjusted)[order]) >= -1e-12)


def bootstrap(outcomes, clusters, seed=0):
    return cluster_bootstrap(np.array(outcomes, dtype=float), clusters, np.random.default_rng(seed))


NAN = float("nan")


def test_bootstrap_value_is_the_mean_of_the_exits():
    # exit shares 2/4 and 1/2 (two not scored) and 1/1: mean 2/3
    estimate = bootstrap([[1, 1, NAN], [1, 0, NAN], [0, NAN, 1], [0, NAN, NAN]], list("abcd"))
    assert estimate.value == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert estimate.low <= estimate.value <= estimate.high


def test_bootstrap_resamples_clusters_not_rows():
    rng = np.random.default_rng(1)
    prompts = rng.random(30) < 0.4
    rows = np.repeat(prompts, 10)[:, None].astype(float)  # ten images a prompt, all alike
    by_prompt = bootstrap(rows, [str(i) for i in range(30) for _ in range(10)])
    by_row = bootstrap(rows, [str(i) for i in range(300)])
    assert by_prompt.value == pytest.approx(by_row.value)
    assert by_prompt.high - by_prompt.low > 2 * (by_row.high - by_row.low)
    # and the width is that of 30 observations
    interval = wilson(int(prompts.sum()), 30)
    assert by_prompt.high - by_prompt.low == pytest.approx(interval.high - interval.low, rel=0.2)


def test_bootstrap_claims_no_certainty():
    assert bootstrap(np.full((3, 2), NAN), list("abc")) == (None, None, None)
    assert bootstrap(np.zeros((20, 2)), [str(i) for i in range(20)]) == (0.0, 0.0, pytest.approx(0.1611, abs=5e-5))
    assert bootstrap(np.ones((20, 2)), [str(i) for i in range(20)]) == (1.0, pytest.approx(0.8389, abs=5e-5), 1.0)
    assert bootstrap([[1, 0], [0, 0]], ["same", "same"]) == (0.25, None, None)


def test_bootstrap_is_seeded():
    outcomes = np.random.default_rng(2).integers(0, 2, (40, 3))
    clusters = [str(i // 2) for i in range(40)]
    assert bootstrap(outcomes, clusters, 5) == bootstrap(outcomes, clusters, 5)
    assert bootstrap(outcomes, clusters, 5) != bootstrap(outcomes, clusters, 6)


def test_disparity():
    assert disparity({3: 0.2, 1: 0.5, 2: 0.1}) == (pytest.approx(5.0), 1, 2, None)
    ratio, largest, smallest, reason = disparity({0: 0.5, 4: 0.0})
    assert (ratio, largest, smallest) == (None, 0, 4)
    assert reason == "the smallest share, at exit 4, is 0"
    assert disparity({}).reason == "nothing was measured"
    assert "at exit 3+18," in (disparity({1: 0.5, 1_003_018: 0.0}).reason or "")


def two_way(outcomes, rows, columns, seed=0):
    return two_way_cluster_bootstrap(np.array(outcomes, dtype=float), rows, columns, np.random.default_rng(seed))


def grid(n_rows, n_columns):
    return [str(i) for i in range(n_rows) for _ in range(n_columns)], [str(j) for j in range(n_columns)] * n_rows


def test_two_way_draws_by_hand():
    # one success in a 2 x 2 table. Its row is drawn 0, 1 or 2 times with 1/4, 1/2, 1/4, and so is its column, so the
    # mean is w1 w2 / 4: 1 with 1/16, 1/2 with 1/4, 1/4 with 1/4, 0 with 7/16.
    outcomes = np.array([[1.0], [0], [0], [0]])
    rows, columns = (np.array([int(x) for x in names]) for names in grid(2, 2))
    means = pigeonhole(outcomes, rows, columns, np.random.default_rng(0), 40_000)
    for value, share in ((1, 1 / 16), (0.5, 1 / 4), (0.25, 1 / 4), (0, 7 / 16)):
        assert (means == value).mean() == pytest.approx(share, abs=0.01)


def test_two_way_variance_follows_owen():
    # additive effects a_i + b_j on a 40 x 30 table: the draws' variance is var(a)/40 + var(b)/30
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(30)
    rows, columns = (np.array([int(x) for x in names]) for names in grid(40, 30))
    cells = (a[:, None] + b[None, :]).reshape(-1, 1)
    means = pigeonhole(cells, rows, columns, np.random.default_rng(0), 4000)
    assert means.var() == pytest.approx(a.var() / 40 + b.var() / 30, rel=0.1)


def test_two_way_is_wider_than_either_way_alone():
    rng = np.random.default_rng(4)
    p = np.clip(0.5 + rng.normal(0, 0.3, (20, 1)) + rng.normal(0, 0.3, (1, 15)), 0, 1)
    outcomes = (rng.random((20, 15)) < p).astype(float).reshape(-1, 1)
    rows, columns = grid(20, 15)
    both, by_row, by_column = two_way(outcomes, rows, columns), bootstrap(outcomes, rows), bootstrap(outcomes, columns)
    assert both.value == pytest.approx(by_row.value)
    assert both.high - both.low > max(by_row.high - by_row.low, by_column.high - by_column.low)


def test_two_way_claims_no_certainty():
    rows, columns = grid(20, 5)
    assert two_way(np.full((100, 2), NAN), rows, columns) == (None, None, None)
    assert two_way(np.zeros((0, 2)), [], []) == (None, None, None)
    # five images are five observations, however many prompts: Wilson's 0 of 5 ends at z²/(5 + z²)
    assert two_way(np.zeros((100, 2)), rows, columns) == (0.0, 0.0, pytest.approx(3.8415 / 8.8415, abs=1e-5))
    assert two_way(np.ones((100, 2)), rows, columns)[:2] == (1.0, pytest.approx(1 - 3.8415 / 8.8415, abs=1e-5))
    assert two_way([[1], [0]], ["a", "b"], ["same", "same"]) == (0.5, None, None)


@settings(relaxed, max_examples=30)
@given(st.integers(2, 5), st.integers(2, 5), st.data())
def test_two_way_holds_its_value_and_cares_for_no_names(n_rows, n_columns, data):
    rows, columns = grid(n_rows, n_columns)
    cells = data.draw(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=len(rows), max_size=len(rows)))
    table = np.array(cells)[:, None]
    got = two_way_cluster_bootstrap(table, rows, columns, np.random.default_rng(0), 200)
    if np.isnan(table).all():
        assert got == (None, None, None)
        return
    assert got.value == pytest.approx(np.nanmean(table))
    if got.low is not None:
        assert 0 <= got.low <= got.high <= 1
    renamed = two_way_cluster_bootstrap(table, ["x" + r for r in rows], columns, np.random.default_rng(0), 200)
    assert renamed == got
    assert two_way_cluster_bootstrap(table, rows, columns, np.random.default_rng(0), 200) == got


def test_two_way_difference():
    rows, columns = grid(20, 10)

    def difference(values, rows=rows, columns=columns):
        values, rng = np.asarray(values)[:, None], np.random.default_rng(0)
        found = paired_cluster_bootstrap(values, 0 * values, rows, rng, limits=(-1, 1), crossing=columns)
        return found.difference, found.low, found.high

    assert difference(np.zeros(200)) == (0.0, pytest.approx(-wilson(0, 10).high), pytest.approx(wilson(0, 10).high))
    rng = np.random.default_rng(5)
    some = (rng.random(200) < 0.3).astype(float)
    value, low, high = difference(some)
    assert value == pytest.approx(some.mean())
    assert 0 < low < value < high
    mirror = difference(-some)
    assert mirror == (pytest.approx(-value), pytest.approx(-high), pytest.approx(-low))
    assert difference(np.full(200, NAN)) == (None, None, None)
    # all differ alike: no draw differs, which is no certainty
    assert difference(np.ones(200)) == (1.0, pytest.approx(1 - 2 * wilson(0, 10).high), 1.0)
    # three prompts of twenty differ, with every image: the images add nothing, thirty cells are three prompts
    by_prompt = [float(row in rows[:30:10]) for row in rows]
    _, low, high = difference(by_prompt)
    assert high - low > 1.7 * (wilson(30, 200).high - wilson(30, 200).low)
    assert difference(some[:10], rows[:10], columns[:10])[1:] == (None, None)


def test_rule_of_three():
    assert rule_of_three(0) is None
    assert rule_of_three(48) == 3 / 48
    assert rule_of_three(2) == 1.0
    # 3/n is the upper limit of 0 in n, one-sided at 95 %: (1 - 3/n)^n is close to .05
    assert (1 - rule_of_three(100)) ** 100 == pytest.approx(0.05, abs=0.003)
