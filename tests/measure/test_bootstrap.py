"""The cluster bootstraps against hand-worked numbers, their variance and their invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.measure.stats import DRAWS, SHARE, bootstrap_mean, paired_cluster_bootstrap, pigeonhole, wilson
from exitwise.run.figures import Estimate

relaxed = settings(deadline=None)  # other work may hold the cores


def bootstrap(outcomes, clusters, seed=0):
    return bootstrap_mean(np.array(outcomes, dtype=float), clusters, np.random.default_rng(seed), SHARE)


NAN = float("nan")
NOTHING = Estimate(None, None, None)


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
    assert bootstrap(np.full((3, 2), NAN), list("abc")) == NOTHING
    twenty = [str(i) for i in range(20)]
    assert bootstrap(np.zeros((20, 2)), twenty) == Estimate(0.0, 0.0, pytest.approx(0.1611, abs=5e-5))
    assert bootstrap(np.ones((20, 2)), twenty) == Estimate(1.0, pytest.approx(0.8389, abs=5e-5), 1.0)
    assert bootstrap([[1, 0], [0, 0]], ["same", "same"]) == Estimate(0.25, None, None)


def test_bootstrap_is_seeded():
    outcomes = np.random.default_rng(2).integers(0, 2, (40, 3))
    clusters = [str(i // 2) for i in range(40)]
    assert bootstrap(outcomes, clusters, 5) == bootstrap(outcomes, clusters, 5)
    assert bootstrap(outcomes, clusters, 5) != bootstrap(outcomes, clusters, 6)


def two_way(outcomes, rows, columns, seed=0, draws=DRAWS):
    outcomes = np.array(outcomes, dtype=float)
    return bootstrap_mean(outcomes, rows, np.random.default_rng(seed), SHARE, columns, draws)


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
    assert two_way(np.full((100, 2), NAN), rows, columns) == NOTHING
    assert two_way(np.zeros((0, 2)), [], []) == NOTHING
    # five images are five observations, however many prompts: Wilson's 0 of 5 ends at z²/(5 + z²)
    assert two_way(np.zeros((100, 2)), rows, columns) == Estimate(0.0, 0.0, pytest.approx(3.8415 / 8.8415, abs=1e-5))
    assert two_way(np.ones((100, 2)), rows, columns) == Estimate(1.0, pytest.approx(1 - 3.8415 / 8.8415, abs=1e-5), 1.0)
    assert two_way([[1], [0]], ["a", "b"], ["same", "same"]) == Estimate(0.5, None, None)


@settings(relaxed, max_examples=30)
@given(st.integers(2, 5), st.integers(2, 5), st.data())
def test_two_way_holds_its_value_and_cares_for_no_names(n_rows, n_columns, data):
    rows, columns = grid(n_rows, n_columns)
    cells = data.draw(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=len(rows), max_size=len(rows)))
    table = np.array(cells)[:, None]
    got = two_way(table, rows, columns, draws=200)
    if np.isnan(table).all():
        assert got == NOTHING
        return
    assert got.value == pytest.approx(np.nanmean(table))
    if got.low is not None:
        assert 0 <= got.low <= got.high <= 1
    renamed = two_way(table, ["x" + r for r in rows], columns, draws=200)
    assert renamed == got
    assert two_way(table, rows, columns, draws=200) == got


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


VALUES = st.floats(0, 1)


@given(st.lists(st.tuples(VALUES, VALUES, st.sampled_from("abcd")), min_size=1, max_size=12), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_mean_lies_in_its_interval_s_world(rows, seed):
    values = np.array([row[:2] for row in rows])
    found = bootstrap_mean(values, [row[2] for row in rows], np.random.default_rng(seed), SHARE, draws=200)
    assert found.value == pytest.approx(values.mean())
    if found.low is not None:
        assert 0 <= found.low <= found.high <= 1


def test_whole_clusters_are_resampled():
    """Ten copies of two prompts hold no more information than two prompts."""
    values = np.array([[0.1]] * 10 + [[0.9]] * 10)
    together = bootstrap_mean(values, ["a"] * 10 + ["b"] * 10, np.random.default_rng(0), SHARE)
    apart = bootstrap_mean(values, [str(i) for i in range(20)], np.random.default_rng(0), SHARE)
    assert (together.low, together.high) == pytest.approx((0.1, 0.9))
    assert apart.high - apart.low < 0.4


def test_no_figure_claims_certainty():
    rng = np.random.default_rng(0)
    assert bootstrap_mean(np.full((3, 1), np.nan), list("abc"), rng) == NOTHING
    # equal values on no scale, and a single cluster
    assert bootstrap_mean(np.full((3, 1), 1.5), list("abc"), rng) == Estimate(1.5, None, None)
    assert bootstrap_mean(np.array([[1.0], [2.0]]), ["a", "a"], rng) == Estimate(1.5, None, None)
    share = wilson(0, 8)
    floor = bootstrap_mean(np.full((8, 1), -2.0), [str(i) for i in range(8)], rng, (-2.0, 2.0))
    assert floor == Estimate(-2.0, -2 + 4 * share.low, -2 + 4 * share.high)
    for wrong in (np.inf, 1.01):
        with pytest.raises(ValueError, match="outside"):
            bootstrap_mean(np.array([[wrong], [0.5]]), ["a", "b"], rng, SHARE)
