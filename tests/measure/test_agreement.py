"""α and κ against published worked examples and their own invariants."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.measure.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, pairwise


def units(*raters):
    """Rows of ratings, "." or "*" where one is missing, to items."""
    columns = zip(*(row.split() for row in raters), strict=True)
    return [[None if x in ".*" else x for x in column] for column in columns]


@pytest.mark.parametrize(
    ("table", "alpha"),
    [
        # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", parts A, B and C
        (units("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"), 0.095),
        (units("a a b b d c c c e d d a", "b a b b b c c c e d d d"), 0.692),
        (
            units(
                "1 2 3 3 2 1 4 1 2 . . .",
                "1 2 3 3 2 2 4 1 2 5 . 3",
                ". 3 3 3 2 3 4 2 2 5 1 .",
                "1 2 3 3 2 4 4 1 2 5 1 .",
            ),
            0.743,
        ),
        # the example of Wikipedia's article
        (
            units(
                "* * * * * 3 4 1 2 1 1 3 3 * 3",
                "1 * 2 1 3 3 4 3 * * * * * * *",
                "* * 2 1 3 4 4 * 2 1 1 3 3 * 4",
            ),
            0.691,
        ),
    ],
)
def test_alpha_meets_published_examples(table, alpha):
    assert krippendorff_alpha(table) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand():
    # items (1,1) (0,0) (1,0): three pairs, n = 6, three of each label.
    # observed: one item with 2 unlike ordered pairs / (2 - 1) = 2 of 6; expected: 2 * 3 * 3 / (6 * 5) = .6
    assert krippendorff_alpha([[1, 1], [0, 0], [1, 0]]) == pytest.approx(1 - (2 / 6) / 0.6)


def test_where_agreement_is_not_defined_there_is_none():
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[1, None], [None, 0]]) is None
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert cohen_kappa([], []) is None
    assert cohen_kappa([1, 1], [1, 1]) is None
    assert cohen_kappa([1, None], [None, 1]) is None
    assert fleiss_kappa([[1, 1], [1, 1]]) is None
    assert fleiss_kappa([[1, None]]) is None
    assert pairwise({"a": [None], "b": [1]}) == [("a", "b", 0, None, None)]


def test_cohen_by_hand():
    # yes-yes 20, yes-no 5, no-yes 10, no-no 15: agreement .7, by chance .5
    first = [1] * 25 + [0] * 25 + [None]
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15 + [1]
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    (pair,) = pairwise({"x": first, "y": second})
    assert pair[:4] == ("x", "y", 50, pytest.approx(0.7))
    assert pair.kappa == pytest.approx(0.4)


def test_fleiss_meets_the_worked_example():
    # Wikipedia's example: 10 subjects, 14 raters, 5 categories, κ = 0.210
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    ratings = [[label for label, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)


rating = st.sampled_from([None, "a", "b", "c"])


@settings(deadline=None)
@given(st.lists(st.lists(rating, min_size=2, max_size=4), min_size=1, max_size=12), st.randoms())
def test_alpha_cares_neither_for_order_nor_for_names(table, random):
    alpha = krippendorff_alpha(table)
    shuffled = [random.sample(unit, len(unit)) for unit in random.sample(table, len(table))]
    renamed = [[r and {"a": "z", "b": "y", "c": "x"}[r] for r in unit] for unit in shuffled]
    assert krippendorff_alpha(renamed) == (None if alpha is None else pytest.approx(alpha))
    assert alpha is None or alpha <= 1 + 1e-12
    if alpha is not None and all(len({r for r in unit if r}) <= 1 for unit in table):
        assert alpha == 1
