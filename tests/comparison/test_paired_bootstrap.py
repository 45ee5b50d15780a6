"""Properties of the paired bootstrap that the intervals of a comparison come from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.measure.stats import paired_cluster_bootstrap, paired_difference, wilson

relaxed = settings(deadline=None)


def bootstrap(first, second, clusters, **keywords):
    return paired_cluster_bootstrap(
        np.asarray(first, float), np.asarray(second, float), clusters, np.random.default_rng(3), draws=400, **keywords
    )


@st.composite
def pairs(draw):
    """(first, second, clusters): scores of up to 12 samples at up to 3 exits, some missing."""
    n, exits = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    value = st.one_of(st.just(float("nan")), st.floats(-10, 10, width=16))
    table = st.lists(st.lists(value, min_size=exits, max_size=exits), min_size=n, max_size=n)
    clusters = draw(st.lists(st.sampled_from("abcdef"), min_size=n, max_size=n))
    return np.array(draw(table)), np.array(draw(table)), clusters


def same(a, b):
    assert [x is None for x in a] == [x is None for x in b]
    assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], abs=1e-6)


@settings(relaxed, max_examples=60)
@given(pairs(), st.randoms(use_true_random=False))
def test_order_of_the_samples_does_not_matter(case, random):
    first, second, clusters = case
    order = list(range(len(clusters)))
    random.shuffle(order)
    same(bootstrap(first, second, clusters), bootstrap(first[order], second[order], [clusters[i] for i in order]))


@settings(relaxed, max_examples=60)
@given(pairs(), st.floats(-5, 5))
def test_a_constant_shift_shifts_the_difference_by_itself(case, shift):
    first, second, clusters = case
    got, moved = bootstrap(first, second, clusters), bootstrap(first + shift, second, clusters)
    same(got[2:], [x if x is None else x - shift for x in moved[2:]])
    both = bootstrap(first + shift, second + shift, clusters)
    same(got[2:], both[2:])


@settings(relaxed, max_examples=60)
@given(pairs())
def test_bootstrap_mirrors(case):
    first, second, clusters = case
    got, mirror = bootstrap(first, second, clusters), bootstrap(second, first, clusters)
    same(got[:2], mirror[1::-1])
    same([got.difference, got.low, got.high], [None if x is None else -x for x in (mirror[2], mirror[4], mirror[3])])


def test_bootstrap_by_hand():
    # exit 0: (1 + 0) / 2 against (0 + 0) / 2; exit 1, where one cell is missing: 1 against 0
    got = bootstrap([[1, 1], [0, 1]], [[0, 0], [0, float("nan")]], ["a", "b"])
    assert got[:3] == (pytest.approx(0.75), 0, pytest.approx(0.75))


def test_bootstrap_pairs():
    """What both runs share cancels: the interval is that of the differences, not of two independent means."""
    rng = np.random.default_rng(5)
    level = rng.normal(0, 10, (200, 1))
    noise = rng.normal(0, 1, (200, 1))
    got = bootstrap(level + noise + 1, level, [str(i) for i in range(200)])
    se = noise.std(ddof=1) / 200**0.5
    assert got.high - got.low == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_bootstrap_claims_no_certainty():
    names = [str(i) for i in range(48)]
    zeros, ones = np.zeros((48, 2)), np.ones((48, 2))
    assert bootstrap(zeros, zeros, names)[2:] == (0, None, None)
    assert bootstrap(zeros, zeros, names, limits=(-1, 1))[2:] == (0, -wilson(0, 48).high, wilson(0, 48).high)
    newcombe = paired_difference([False] * 48, [False] * 48)
    assert bootstrap(zeros, zeros, names, limits=(-1, 1)).high == pytest.approx(newcombe.high)
    fell = bootstrap(zeros, ones, names, limits=(-1, 1))
    assert fell[2:] == (-1, -1, pytest.approx(-1 + 2 * wilson(0, 48).high))
    assert bootstrap(zeros[:1], ones[:1], ["a"], limits=(-1, 1)) == (0, 1, -1, None, None)
    assert bootstrap(zeros * np.nan, ones, names) == (None,) * 5
