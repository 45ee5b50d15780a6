"""Random answers for tests of the formulas of PPO: valid numbers, and garbage in their padding."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

R = 1e-12
GARBAGE = 1e4  # what stands in the padding must not matter


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


class Case(NamedTuple):
    """B rows of answers, right-padded, garbage in the padding of all but the mask."""

    mask: torch.Tensor
    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    values: torch.Tensor
    old_values: torch.Tensor
    rewards: torch.Tensor
    scores: torch.Tensor


def make_case(lengths: list[int], seed: int, extra: int = 0) -> Case:
    """The valid numbers depend on `lengths` and `seed` alone, the padding on `extra` too."""
    rng, dirt = np.random.default_rng(seed), np.random.default_rng(1000 * seed + extra)
    width = max(lengths) + extra
    mask = np.array([[float(t < n) for t in range(width)] for n in lengths])

    def fill(draw):
        rows = [np.concatenate([draw(n), dirt.uniform(-GARBAGE, GARBAGE, width - n)]) for n in lengths]
        return torch.tensor(np.array(rows))

    old = fill(lambda n: -rng.exponential(2.0, n))
    near = lambda spread: old + fill(lambda n: rng.normal(0, spread, n))
    noise = lambda n: rng.normal(0, 1, n)
    values = fill(noise)
    return Case(
        torch.tensor(mask), near(0.4), old, near(0.7), values, values + fill(lambda n: rng.normal(0, 0.3, n)),
        fill(noise), torch.tensor(rng.normal(0, 2, len(lengths))),
    )  # fmt: skip


def valid(tensor_: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    return [row[: int(m.sum())].tolist() for row, m in zip(tensor_, mask, strict=True)]


def assert_valid(found: torch.Tensor, mask: torch.Tensor, wanted: list[list[float]]) -> None:
    """Equal on the valid tokens, exactly 0 in the padding."""
    for got, row in zip(valid(found, mask), wanted, strict=True):
        assert got == pytest.approx(row, rel=1e-9, abs=1e-9)
    assert float((found * (1 - mask)).abs().max()) == 0.0


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**20)
UNIT = st.floats(0.0, 1.0)


def flat(rows):
    return [x for row in rows for x in row]
