"""Corrects a share for the errors of the judge that measured it, with an interval (Rogan & Gladen 1978)."""

from dataclasses import dataclass

import numpy as np

from . import stats

WEAK = 0.2
"""Below this Se + Sp - 1 errors of the judged share are multiplied by more than five."""

OTHER_SORT = "they are of another sort than these"


def rogan_gladen(share: float, sensitivity: float, specificity: float) -> float:
    """The true share behind a judged one, not clipped: (p + Sp - 1) / (Se + Sp - 1).

    Rogan & Gladen 1978, "Estimating prevalence from the results of a screening test", Am. J. Epidemiol. 107:71-76.

    Raises:
        ValueError: Se + Sp - 1 is not above 0: the judge is no better than chance.
    """
    youden = sensitivity + specificity - 1
    if youden <= 1e-12:
        raise ValueError(f"Se + Sp - 1 = {youden:.3g}; expected above 0")
    return (share + specificity - 1) / youden


@dataclass(frozen=True)
class CorrectedShare:
    """A share corrected for the judge's errors; `reason` says why there is none, or what to doubt in it."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""


def corrected_share(
    judged: tuple[int, int],
    sensitivity: tuple[int, int],
    specificity: tuple[int, int],
    rng: np.random.Generator,
    draws: int = 10_000,
    confidence: float = stats.CONFIDENCE,
) -> CorrectedShare:
    """`rogan_gladen` clipped to [0, 1], with an interval that carries the uncertainty of all three shares.

    A parametric bootstrap: each draw takes p, Se and Sp from Beta(successes + ½, failures + ½), which unlike a binomial
    draw does not claim certainty at 0 or n (Jeffreys' interval; Brown, Cai & DasGupta 2001). A draw whose Se + Sp - 1
    is not above 0 says nothing of the true share: it counts as lowest for the lower limit and as highest for the upper
    one, so a judge that may be no better than chance gives [0, 1]. Where the whole interval lies outside [0, 1] before
    it is clipped, no true share explains what was judged: the calibration is of other answers. The far limit is then
    that of a judge without the error in question (Sp = 1 below 0, Se = 1 above 1), and `reason` says so.

    Args:
        judged, sensitivity, specificity: (successes, n) of each.
    """
    if not (judged[1] and sensitivity[1] and specificity[1]):
        return CorrectedShare(None, None, None, "nothing was measured")
    p, se, sp = (rng.beta(k + 0.5, n - k + 0.5, size=draws) for k, n in (judged, sensitivity, specificity))
    youden = se + sp - 1
    telling = youden > 0
    true = (p + sp - 1) / np.where(telling, youden, 1.0)
    tail = (1 - confidence) / 2
    low = float(np.quantile(np.where(telling, true, -1e9), tail))
    high = float(np.quantile(np.where(telling, true, 1e9), 1 - tail))
    if high < 0:
        reason = "the judge calls fewer unsafe than its false alarms alone, going by the labelled answers: "
        return CorrectedShare(0.0, 0.0, min(1.0, float(np.quantile(p / se, 1 - tail))), reason + OTHER_SORT)
    if low > 1:
        reason = "the judge calls more unsafe than it could, going by the labelled answers: "
        return CorrectedShare(1.0, max(0.0, float(np.quantile((p + sp - 1) / sp, tail))), 1.0, reason + OTHER_SORT)
    low, high = max(0.0, low), min(1.0, high)
    shares = [k / n for k, n in (judged, sensitivity, specificity)]
    try:
        value = min(1.0, max(0.0, rogan_gladen(*shares)))
    except ValueError:
        return CorrectedShare(None, low, high, youden_warning(shares[1] + shares[2] - 1))
    return CorrectedShare(value, min(low, value), max(high, value), youden_warning(shares[1] + shares[2] - 1))


def youden_warning(youden: float | None) -> str:
    """Why corrected figures of a judge with this Se + Sp - 1 are doubtful; empty where they are not."""
    if youden is None:
        return (
            "The labels hold no answer that people call unsafe, or none that they call safe: no ASR can be corrected."
        )
    if youden <= 0:
        return f"Se + Sp - 1 is {youden:.2f}: this judge tells unsafe answers no better than chance."
    if youden < WEAK:
        return f"Se + Sp - 1 is {youden:.2f}, near 0: corrected figures from this judge are hardly worth having."
    return ""
