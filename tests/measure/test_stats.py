"""Statistics against hand-worked numbers, published examples and their own invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from exitwise.measure.stats import (
    disparity,
    holm,
    mcnemar_exact,
    paired_difference,
    rule_of_three,
    wilson,
)
from exitwise.run.exit import Exit
from exitwise.run.figures import Disparity, Interval

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
        assert (interval.successes, interval.n) == (successes, n)


@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_wilson_is_scipy_s_to_the_last_bit(confidence):
    for n in (1, 2, 7, 48, 263, 2000):
        for successes in {0, 1, n // 3, n // 2, n - 1, n}:
            expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
            found = wilson(successes, n, confidence)
            assert (found.low, found.high) == (expected.low, expected.high)


def test_wilson_of_nothing_is_nothing():
    assert wilson(0, 0) == Interval(None, None, None, 0, 0)


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


def test_disparity():
    assert disparity({3: 0.2, 1: 0.5, 2: 0.1}) == Disparity(pytest.approx(5.0), Exit([1]), Exit([2]), None)
    assert disparity({0: 0.5, 4: 0.0}) == Disparity(None, Exit([0]), Exit([4]), "the smallest share, at exit 4, is 0")
    assert disparity({}).reason == "nothing was measured"
    assert "at exit 3+18," in (disparity({Exit([1]): 0.5, Exit([3, 18]): 0.0}).reason or "")


def test_rule_of_three():
    assert rule_of_three(0) is None
    assert rule_of_three(48) == 3 / 48
    assert rule_of_three(2) == 1.0
    # 3/n is the upper limit of 0 in n, one-sided at 95 %: (1 - 3/n)^n is close to .05
    assert (1 - rule_of_three(100)) ** 100 == pytest.approx(0.05, abs=0.003)
