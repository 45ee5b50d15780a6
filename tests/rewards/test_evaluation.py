"""Figures of a reward model on pairs, worked by hand."""

import numpy as np
import pytest
import torch

from exitwise.rewards.evaluation import calibration_error, mean_and_spread, measure


def test_calibration_by_hand():
    """Confidences .9 (right), .9 (wrong), .6 (right), .6 (right): (2·|.5 - .9| + 2·|1 - .6|) / 4."""
    assert calibration_error(np.array([0.9, 0.1, 0.6, 0.6])) == pytest.approx(0.4)
    assert calibration_error(np.array([1.0, 1.0])) == pytest.approx(0)


def test_measures_by_category():
    found = measure(np.array([1.0, -1.0, 0.0, 2.0]), ["a", "a", "b", ""])
    assert list(found) == ["all", "a", "b"]
    assert (found["all"].accuracy.successes, found["all"].n) == (2, 4)
    assert found["b"].accuracy.value == 0  # a tie is not won
    assert found["a"].margin == 0
    assert found["a"].brier == pytest.approx((0.268941**2 + 0.731059**2) / 2, abs=1e-6)


def test_shift_and_scale():
    assert mean_and_spread(torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    assert mean_and_spread(torch.tensor([2.0, 2.0])) == (2.0, 1.0)
