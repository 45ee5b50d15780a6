"""The PPO maths against numbers worked by hand, against plain loops written from the equations, and its invariants.

Everything is in float64, so that tolerances can be tight. `pytest.approx(x, rel=R)` below compares to 12 digits.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.alignment import ppo
from tests.alignment.cases import LENGTHS, SEEDS, UNIT, R, assert_valid, flat, make_case, tensor, valid

# ------------------------------------------------------------------------------------------------ worked by hand


def test_masked_mean_by_hand():
    values, mask = tensor([1, 2, 99], [3, 99, 99]), tensor([1, 1, 0], [1, 0, 0])
    assert ppo.masked_mean(values, mask).item() == (1 + 2 + 3) / 3
    assert math.isnan(ppo.masked_mean(values, torch.zeros_like(mask)).item())


def test_masked_whiten_by_hand():
    """1, 2, 3: mean 2, variance ((-1)^2 + 0 + 1^2) / 3 = 2/3, so 1 becomes -1 / sqrt(2/3) = -sqrt(3/2)."""
    values, mask = tensor([1, 2, 99], [3, 99, 99]), tensor([1, 1, 0], [1, 0, 0])
    one = 1 / math.sqrt(2 / 3 + 1e-8)
    assert one == pytest.approx(math.sqrt(1.5), rel=1e-7)
    assert torch.allclose(ppo.masked_whiten(values, mask), tensor([-one, 0, 0], [one, 0, 0]), rtol=R, atol=0)
    kept = ppo.masked_whiten(values, mask, shift_mean=False)
    assert torch.allclose(kept, tensor([2 - one, 2, 0], [2 + one, 0, 0]), rtol=R, atol=0)


def test_last_token_by_hand():
    assert ppo.last_token(tensor([1, 1, 0], [1, 0, 0], [1, 1, 1])).tolist() == [1, 0, 2]


def test_token_rewards_by_hand():
    """kl = log pi - log pi_ref; reward = -0.1 * kl, and the score on the last valid token."""
    found = ppo.token_rewards(
        scores=torch.tensor([2.0, -1.0], dtype=torch.float64),
        logprobs=tensor([-1, -2, 7], [-0.5, 7, 7]),
        ref_logprobs=tensor([-1.5, -1, 0], [-2.5, 0, 0]),
        mask=tensor([1, 1, 0], [1, 0, 0]),
        kl_coef=0.1,
    )
    assert torch.allclose(found.kl, tensor([0.5, -1, 0], [2, 0, 0]), rtol=R, atol=0)
    assert torch.allclose(found.rewards, tensor([-0.05, 0.1 + 2, 0], [-0.2 - 1, 0, 0]), rtol=R, atol=0)


def test_gae_by_hand():
    """gamma 0.9, lambda 0.8, gamma * lambda = 0.72; the value after the last token is 0.

    delta_2 = 1 + 0.9 * 0.0 - 0.3 =  0.70    A_2 =  0.70
    delta_1 = 0 + 0.9 * 0.3 - 0.4 = -0.13    A_1 = -0.13 + 0.72 * 0.70   = 0.374
    delta_0 = 0 + 0.9 * 0.4 - 0.5 = -0.14    A_0 = -0.14 + 0.72 * 0.374  = 0.12928
    """
    found = ppo.gae(tensor([0, 0, 1, 50]), tensor([0.5, 0.4, 0.3, 50]), tensor([1, 1, 1, 0]), 0.9, 0.8)
    assert torch.allclose(found.advantages, tensor([0.12928, 0.374, 0.7, 0]), rtol=R, atol=0)
    assert torch.allclose(found.returns, tensor([0.62928, 0.774, 1.0, 0]), rtol=R, atol=0)


RATIOS = [1.5, 0.5, 1.5, 0.5, 1.1, 1.25]
ADVANTAGES = [1.0, 1.0, -1.0, -1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("high", "each", "clipped"),
    [  # max(-r A, -clip(r) A), with r between 0.8 and 1.2, or between 0.8 and 1.28
        (None, [-1.2, -0.5, 1.5, 0.8, -2.2, -1.2], [1, 0, 0, 1, 0, 1]),
        (0.28, [-1.28, -0.5, 1.5, 0.8, -2.2, -1.25], [1, 0, 0, 1, 0, 0]),
    ],
)
def test_policy_loss_by_hand(high, each, clipped):
    old = tensor([-1, -2, -0.1], [-3, -1, -1])
    new = old + torch.log(torch.tensor(RATIOS, dtype=torch.float64)).view(2, 3)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).view(2, 3)
    found = ppo.policy_loss(new, old, advantages, torch.ones_like(old), 6.0, 0.2, high)
    assert found.loss.item() == pytest.approx(sum(each) / 6, rel=R)
    assert torch.allclose(found.ratio.flatten(), tensor(RATIOS), rtol=R, atol=0)
    assert found.clipped.flatten().tolist() == clipped


def test_a_clipped_token_has_no_gradient():
    old = torch.zeros(1, 6, dtype=torch.float64)
    new = torch.log(tensor(RATIOS)).requires_grad_()
    ppo.policy_loss(new, old, tensor(ADVANTAGES), torch.ones_like(old), 6.0, 0.2).loss.backward()
    wanted = [0.0, -0.5 / 6, 1.5 / 6, 0.0, -2.2 / 6, 0.0]  # d(-r A) / d(log r) = -r A
    assert torch.allclose(new.grad, tensor(wanted), rtol=R, atol=1e-15)


def test_value_loss_by_hand():
    """Old value 0.5, range 0.2, so the clipped value lies in 0.3 .. 0.7.

    V 1.0, R 0.2: plain 0.64, clipped (0.7 - 0.2)^2 = 0.25: plain
    V 0.0, R 0.2: plain 0.04, clipped (0.3 - 0.2)^2 = 0.01: plain
    V 0.1, R 0.0: plain 0.01, clipped (0.3 - 0.0)^2 = 0.09: clipped
    """
    old = torch.full((1, 4), 0.5, dtype=torch.float64)
    found = ppo.value_loss(tensor([1.0, 0.0, 0.1, 9]), old, tensor([0.2, 0.2, 0.0, -9]), tensor([1, 1, 1, 0]), 3.0, 0.2)
    assert found.loss.item() == pytest.approx((0.64 + 0.04 + 0.09) / 3, rel=R)
    assert found.clipped.tolist() == [[0, 0, 1, 0]]


def test_kl_k3_by_hand():
    """d = log 2: 2 - 1 - log 2; d = -log 2: 1/2 - 1 + log 2; padding: 0."""
    log2 = math.log(2)
    found = ppo.kl_k3(tensor([-log2, 0.0, 3.0]), tensor([0.0, -log2, 8.0]), tensor([1, 1, 0]))
    assert torch.allclose(found, tensor([1 - log2, log2 - 0.5, 0.0]), rtol=R, atol=1e-15)


def test_shift_by_hand():
    """Ratios 3/2 and 1/2, advantages 2 and -1.

    gain = (0.5 * 2 + -0.5 * -1) / 2 = 0.75; KL of the tokens: 1/2 - log(3/2) and -1/2 + log 2; TV: 1/4 and 1/4.
    """
    new = torch.log(tensor([1.5, 0.5, 1.0])) + tensor([0, 0, 3])
    found = ppo.shift(new, torch.zeros_like(new), tensor([2, -1, 100]), tensor([1, 1, 0]))
    first, second = 0.5 - math.log(1.5), math.log(2) - 0.5
    assert found == pytest.approx((0.75, (first + second) / 2, second, 0.25, 0.25), rel=R)


def test_group_advantages_by_hand():
    """1 and 3: mean 2, deviation sqrt((1 + 1) / 2) = 1. 2, 2: nothing to learn. 0, 6: mean 3, deviation 3."""
    scores = torch.tensor([1, 3, 2, 2, 0, 6], dtype=torch.float64)
    found = ppo.group_advantages(scores, 2)
    one, three = 1 / (1 + 1e-6), 3 / (3 + 1e-6)
    wanted = torch.tensor([-one, one, 0, 0, -three, three], dtype=torch.float64)
    assert torch.allclose(found, wanted, rtol=R, atol=0)
    assert ppo.group_advantages(scores, 3).shape == (6,)


def test_dpo_loss_by_hand():
    """Margins 2 and 0, beta 1/2: -log sigma(1) = log(1 + 1/e). A zero margin: log 2, whatever beta is."""
    one = lambda x: torch.tensor([float(x)], dtype=torch.float64)
    two = ppo.dpo_loss(one(-1), one(-3), one(-2), one(-2), 0.5)
    assert two.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=R)
    assert ppo.dpo_loss(one(-1), one(-3), one(-5), one(-7), 0.7).item() == pytest.approx(math.log(2), rel=R)
    better = ppo.dpo_loss(one(-1), one(-4), one(-2), one(-2), 0.5)
    assert better.item() < two.item()


def test_adaptive_kl_by_hand():
    """Target 6, 32 samples of a horizon of 10000: at most 1 + 0.2 * 32 / 10000 = 1.00064."""
    step = lambda kl: ppo.adapt_kl_coef(0.05, kl, 6.0, 32, 10_000)
    assert step(12.0) == pytest.approx(0.05 * 1.00064, rel=R)
    assert step(3.0) == pytest.approx(0.05 * 0.99936, rel=R)
    assert step(6.3) == pytest.approx(0.05 * (1 + 0.05 * 32 / 10_000), rel=R)
    assert step(6.0) == 0.05


# ------------------------------------------------------------------------------------------------ plain loops


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, extra=st.integers(0, 3), kl_coef=st.floats(0, 2))
def test_token_rewards_against_loops(lengths, seed, extra, kl_coef):
    case = make_case(lengths, seed, extra)
    found = ppo.token_rewards(case.scores, case.logprobs, case.ref, case.mask, kl_coef)
    kl, rewards = [], []
    for mine, theirs, score in zip(
        valid(case.logprobs, case.mask), valid(case.ref, case.mask), case.scores.tolist(), strict=True
    ):
        kl.append([a - b for a, b in zip(mine, theirs, strict=True)])
        rewards.append([-kl_coef * x for x in kl[-1]])
        rewards[-1][-1] += score
    assert_valid(found.kl, case.mask, kl)
    assert_valid(found.rewards, case.mask, rewards)
    whole = torch.tensor([sum(row) for row in kl], dtype=torch.float64)
    total = case.scores - kl_coef * whole  # R = r - eta * KL of the whole answer
    assert torch.allclose(found.rewards.sum(dim=1), total, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, extra=st.integers(0, 3), gamma=UNIT, lam=UNIT)
def test_gae_against_the_sum_of_its_definition(lengths, seed, extra, gamma, lam):
    """A_t = sum over k of (gamma lambda)^k delta_(t+k), with no recursion."""
    case = make_case(lengths, seed, extra)
    found = ppo.gae(case.rewards, case.values, case.mask, gamma, lam)
    advantages, returns = [], []
    for r, v in zip(valid(case.rewards, case.mask), valid(case.values, case.mask), strict=True):
        v = [*v, 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        row = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))]
        advantages.append(row)
        returns.append([a + b for a, b in zip(row, v, strict=False)])
    assert_valid(found.advantages, case.mask, advantages)
    assert_valid(found.returns, case.mask, returns)


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, gamma=UNIT)
def test_gae_with_lambda_1_is_the_monte_carlo_return_less_the_value(lengths, seed, gamma):
    case = make_case(lengths, seed)
    for g in (1.0, gamma):
        found = ppo.gae(case.rewards, case.values, case.mask, g, 1.0)
        togo = [[sum(g ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
                for r in valid(case.rewards, case.mask)]  # fmt: skip
        assert_valid(found.returns, case.mask, togo)
        less = [
            [x - v for x, v in zip(*rows, strict=True)]
            for rows in zip(togo, valid(case.values, case.mask), strict=True)
        ]
        assert_valid(found.advantages, case.mask, less)


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, extra=st.integers(0, 3), low=st.floats(0.05, 0.5), more=st.none() | UNIT)
def test_losses_against_loops(lengths, seed, extra, low, more):
    case, n = make_case(lengths, seed, extra), float(sum(lengths))
    high = None if more is None else low + more
    found = ppo.policy_loss(case.logprobs, case.old, case.rewards, case.mask, n, low, high)
    total, clipped = 0.0, []
    lists = [
        valid(t, case.mask) for t in (case.logprobs, case.old, case.rewards, case.values, case.old_values, case.ref)
    ]
    for new, old, advantage in zip(*map(flat, lists[:3]), strict=True):
        ratio = math.exp(new - old)
        inside = min(max(ratio, 1 - low), 1 + (low if high is None else high))
        gain = min(ratio * advantage, inside * advantage)  # the paper maximises this
        total -= gain
        clipped.append(float(inside * advantage < ratio * advantage))
    assert found.loss.item() == pytest.approx(total / n, rel=1e-9, abs=1e-12)
    assert flat(valid(found.clipped, case.mask)) == clipped
    assert float((found.clipped * (1 - case.mask)).sum()) == 0

    value = ppo.value_loss(case.values, case.old_values, case.ref, case.mask, n, low)
    total = 0.0
    for new, old, goal in zip(*map(flat, lists[3:]), strict=True):
        near = min(max(new, old - low), old + low)
        total += max((new - goal) ** 2, (near - goal) ** 2)
    assert value.loss.item() == pytest.approx(total / n, rel=1e-9)

    k3 = ppo.kl_k3(case.logprobs, case.ref, case.mask)
    wanted = [[math.exp(b - a) - 1 - (b - a) for a, b in zip(*rows, strict=True)]
              for rows in zip(lists[0], lists[5], strict=True)]  # fmt: skip
    assert_valid(k3, case.mask, wanted)
    assert float(k3.min()) >= 0.0

    moved = ppo.shift(case.logprobs, case.old, case.rewards, case.mask)
    ratios = [math.exp(a - b) for a, b in zip(flat(lists[0]), flat(lists[1]), strict=True)]
    kls = [r - 1 - math.log(r) for r in ratios]
    tvs = [abs(r - 1) / 2 for r in ratios]
    gain = sum((r - 1) * a for r, a in zip(ratios, flat(lists[2]), strict=True)) / n
    wanted = (gain, sum(kls) / n, max(kls), sum(tvs) / n, max(tvs))  # type: ignore[assignment]
    assert moved == pytest.approx(wanted, rel=1e-6, abs=1e-9)  # the loops' logarithm of a ratio near 1 is the rough one


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 4), size=st.integers(2, 5), seed=SEEDS, beta=st.floats(0.01, 2))
def test_group_advantages_and_dpo_against_loops(groups, size, seed, beta):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 1, groups * size)
    wanted = []
    for start in range(0, len(scores), size):
        group = scores[start : start + size]
        mean = sum(group) / size
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / size)
        wanted += [(x - mean) / (deviation + 1e-6) for x in group]
    found = ppo.group_advantages(torch.tensor(scores), size)
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert found.view(-1, size).sum(dim=1).abs().max().item() < 1e-9

    a, b, c, d = rng.normal(0, 5, (4, groups))
    found = ppo.dpo_loss(*map(torch.tensor, (a, b, c, d)), beta)  # type: ignore[call-arg]
    wanted = [-math.log(1 / (1 + math.exp(-beta * ((a[i] - b[i]) - (c[i] - d[i]))))) for i in range(groups)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
