"""Computes agreement between raters: people, a judge and people, or several judges.

Krippendorff's α is written here because the package that has it is GPL-3; Cohen's and Fleiss' κ are statsmodels'.
A figure is None where it is undefined, such as where only one label was ever used: that is not perfect agreement.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

Rating = Hashable | None
"""None where a rater gave none."""


class RaterAgreement(NamedTuple):
    """Two raters over the items that both rated."""

    first: str
    second: str
    n: int
    agreement: float | None
    """Share of items with equal labels."""
    kappa: float | None
    """Cohen's κ."""


def krippendorff_alpha(units: Sequence[Sequence[Rating]]) -> float | None:
    """Krippendorff's α for nominal data with missing ratings: 1 - observed over expected disagreement.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", part C. An item with m ratings weighs each of its
    ordered pairs 1/(m - 1); items with fewer than two ratings pair with nothing and are left out.

    Args:
        units: the ratings of each item, one a rater, in any order.

    Returns:
        None where no item has two ratings, or all of them are one and the same label.
    """
    disagreement, totals = 0.0, Counter[Hashable]()
    for ratings in units:
        counts = Counter(rating for rating in ratings if rating is not None)
        m = sum(counts.values())
        if m < 2:
            continue
        disagreement += sum(count * (m - count) for count in counts.values()) / (m - 1)
        totals.update(counts)
    n = sum(totals.values())
    expected = sum(count * (n - count) for count in totals.values())
    return 1 - (n - 1) * disagreement / expected if expected else None


def cohen_kappa(first: Sequence[Rating], second: Sequence[Rating]) -> float | None:
    """Cohen 1960's κ over the items both rated; None where there are none, or both give all the same one label.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
    labels = sorted({label for pair in pairs for label in pair}, key=repr)
    if len(labels) < 2:
        return None
    import numpy as np
    from statsmodels.stats.inter_rater import cohens_kappa

    table = np.zeros((len(labels), len(labels)))
    for x, y in pairs:
        table[labels.index(x), labels.index(y)] += 1
    return float(cohens_kappa(table, return_results=False))


def fleiss_kappa(units: Sequence[Sequence[Rating]]) -> float | None:
    """Fleiss 1971's κ over the items that every rater rated; None where there are none or only one label occurs."""
    whole = [unit for unit in units if len(unit) > 1 and None not in unit]
    if not whole or len({len(unit) for unit in whole}) > 1 or len({r for unit in whole for r in unit}) < 2:
        return None
    import numpy as np
    from statsmodels.stats.inter_rater import fleiss_kappa as kappa

    labels = sorted({rating for unit in whole for rating in unit}, key=repr)
    return float(kappa(np.array([[unit.count(label) for label in labels] for unit in map(list, whole)])))


def pairwise(ratings: Mapping[str, Sequence[Rating]]) -> list[RaterAgreement]:
    """Agreement and κ of every two raters.

    Args:
        ratings: by rater, one entry an item, all in the same order.
    """
    found = []
    for first, second in combinations(ratings, 2):
        pairs = [(x, y) for x, y in zip(ratings[first], ratings[second], strict=True) if None not in (x, y)]
        equal = sum(x == y for x, y in pairs)
        kappa = cohen_kappa(ratings[first], ratings[second])
        found.append(RaterAgreement(first, second, len(pairs), equal / len(pairs) if pairs else None, kappa))
    return found
