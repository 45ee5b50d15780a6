"""Invariants of the PPO formulas: padding, ratio one, whitening, cutting of mini-batches, clip-higher, adaptive KL."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.alignment import ppo
from tests.alignment.cases import LENGTHS, SEEDS, Case, R, flat, make_case, tensor, valid


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, extra=st.integers(1, 4))
def test_more_padding_changes_nothing(lengths, seed, extra):
    """Wider, with other garbage in the padding: all results on valid tokens are the same, and 0 elsewhere."""
    width = max(lengths)
    plain, padded = [_everything(make_case(lengths, seed, e)) for e in (0, extra)]
    for name, value in plain.items():
        other = padded[name]
        if value.dim() == 2:
            assert float(other[:, width:].abs().sum()) == 0.0, name
            other = other[:, :width]
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-9), name


def _everything(case: Case) -> dict[str, torch.Tensor]:
    mask, n = case.mask, float(case.mask.sum())
    parts = ppo.token_rewards(case.scores, case.logprobs, case.ref, mask, 0.1)
    estimated = ppo.gae(parts.rewards, case.values, mask, 0.97, 0.9)
    whitened = ppo.masked_whiten(estimated.advantages, mask)
    policy = ppo.policy_loss(case.logprobs, case.old, whitened, mask, n, 0.2, 0.3)
    value = ppo.value_loss(case.values, case.old_values, estimated.returns, mask, n, 0.2)
    dirty = ppo.policy_loss(case.logprobs, case.old, case.rewards, mask, n, 0.2)  # garbage in every argument
    whole = ppo.masked_whiten(case.rewards, mask, shift_mean=False)
    k3 = ppo.kl_k3(case.logprobs, case.ref, mask)
    return {
        "last": ppo.last_token(mask), "mean": ppo.masked_mean(case.values, mask), "kl": parts.kl,
        "rewards": parts.rewards, "whitened rewards": whole,
        "advantages": whitened, "returns": estimated.returns, "policy": policy.loss, "clipped": policy.clipped,
        "value": value.loss, "value clipped": value.clipped, "dirty": dirty.loss, "k3": k3,
        "shift": torch.tensor(ppo.shift(case.logprobs, case.old, case.rewards, mask)),
    }  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=SEEDS)
def test_a_ratio_of_one(lengths, seed):
    """Before the first update: loss = -mean advantage, its gradient -advantage / n, nothing clipped, no shift."""
    case, n = make_case(lengths, seed, 1), float(sum(lengths))
    new = case.old.clone().requires_grad_()
    found = ppo.policy_loss(new, case.old, case.rewards, case.mask, n, 0.2)
    assert found.loss.item() == pytest.approx(-ppo.masked_mean(case.rewards, case.mask).item(), rel=1e-9, abs=1e-12)
    assert found.clipped.sum() == 0
    assert torch.equal(found.ratio, torch.ones_like(found.ratio))
    found.loss.backward()
    assert torch.allclose(new.grad, -case.rewards * case.mask / n, rtol=1e-9, atol=1e-12)
    assert tuple(ppo.shift(case.old, case.old, case.rewards, case.mask)) == (0, 0, 0, 0, 0)


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS.filter(lambda n: sum(n) > 1), seed=SEEDS, scale=st.floats(0.1, 100), offset=st.floats(-50, 50))
def test_whitening_gives_mean_0_and_variance_1(lengths, seed, scale, offset):
    case = make_case(lengths, seed, 2)
    values = flat(valid(ppo.masked_whiten(case.rewards * scale + offset, case.mask), case.mask))
    assert np.mean(values) == pytest.approx(0, abs=1e-9)
    spread = np.std(flat(valid(case.rewards * scale, case.mask)))
    assert np.std(values) == pytest.approx(1, rel=1e-8 / min(1, spread) ** 2 + 1e-9)
    kept = flat(valid(ppo.masked_whiten(case.rewards * scale + offset, case.mask, shift_mean=False), case.mask))
    assert np.mean(kept) == pytest.approx(np.mean(flat(valid(case.rewards * scale + offset, case.mask))), abs=1e-9)
    assert np.std(kept) == pytest.approx(np.std(values), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, -1.0, 3.7])
def test_constant_values_whiten_to_0_and_not_to_nan(value):
    mask = tensor([1, 1, 0], [1, 0, 0])
    same = torch.full_like(mask, value)
    assert ppo.masked_whiten(same, mask).abs().max().item() < 1e-9
    assert torch.allclose(ppo.masked_whiten(same, mask, shift_mean=False), same * mask, rtol=R, atol=1e-9)
    one = ppo.masked_whiten(tensor([value]), tensor([1]))  # one token in all
    assert one.item() == 0.0


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=SEEDS, data=st.data())
def test_cutting_a_mini_batch_changes_neither_loss_nor_gradient(lengths, seed, data):
    case, n = make_case(lengths, seed, 1), float(sum(lengths))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    order = data.draw(st.permutations(range(len(lengths))))
    results = []
    for pieces in ([order], [order[:cut], order[cut:]], [[i] for i in order]):
        new, values = case.logprobs.clone().requires_grad_(), case.values.clone().requires_grad_()
        total = 0.0
        for rows in pieces:
            width = int(case.mask[rows].sum(dim=1).max())  # a piece is only as wide as it must be
            cell = lambda t, rows=rows, width=width: t[rows, :width]
            policy = ppo.policy_loss(cell(new), cell(case.old), cell(case.rewards), cell(case.mask), n, 0.2)
            value = ppo.value_loss(cell(values), cell(case.old_values), cell(case.ref), cell(case.mask), n, 0.2)
            loss = policy.loss + 0.1 * value.loss
            loss.backward()
            total += loss.item()
        results.append((total, new.grad, values.grad))
    for total, *gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-9)
        for found, wanted in zip(gradients, results[0][1:], strict=True):
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(ratio=st.floats(0.3, 3), advantage=st.floats(-3, 3), low=st.floats(0.05, 0.4), more=st.floats(0.01, 0.5))
def test_clip_higher_lets_only_good_tokens_grow_more(ratio, advantage, low, more):
    one = lambda x: tensor([x])
    loss = lambda high: ppo.policy_loss(
        torch.log(one(ratio)), one(0.0), one(advantage), one(1.0), 1.0, low, high
    ).loss.item()
    plain, higher = loss(None), loss(low + more)
    assert loss(low) == plain
    if advantage > 0 and ratio > 1 + low:
        assert higher < plain
    else:
        assert higher == plain


@settings(deadline=None)
@given(
    coef=st.floats(1e-4, 10), kl=st.floats(-50, 500), target=st.floats(0.1, 50), n=st.integers(1, 512),
    slack=st.integers(0, 10_000),
)  # fmt: skip
def test_adaptive_kl_moves_the_right_way_and_is_bounded(coef, kl, target, n, slack):
    horizon = n + slack  # AlignConfig.check holds batches to the horizon
    found = ppo.adapt_kl_coef(coef, kl, target, n, horizon)
    assert found > 0
    assert abs(found / coef - 1) <= 0.2 * n / horizon + 1e-12
    if kl > target:
        assert found >= coef
    else:
        assert found <= coef


def test_over_a_horizon_the_coefficient_changes_by_e_to_a_fifth():
    coef = 1.0
    for _ in range(1000):
        coef = ppo.adapt_kl_coef(coef, 100.0, 1.0, 10, 10_000)
    assert coef == pytest.approx(math.exp(0.2), rel=1e-3)


@given(score=st.floats(-10, 10), groups=st.integers(1, 3), size=st.integers(2, 8))
def test_equal_scores_in_a_group_teach_nothing(score, groups, size):
    found = ppo.group_advantages(torch.full((groups * size,), score, dtype=torch.float64), size)
    assert found.abs().max().item() < 1e-8
