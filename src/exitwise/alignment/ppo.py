"""Formulas of L-PPO and of its baselines: pure functions from tensors to NamedTuples, without a model.

L-PPO (Bachu et al., 2025, section 4) is clipped PPO whose every quantity is computed on the embeddings of one exit: the
exit enters through the log-probabilities, so no function here takes one. Departures from the paper: none in the
formulas; it leaves the form of the KL term open, and we take it per token inside the reward (Ouyang et al., 2022).

Shapes: B rows, T response tokens (right-padded; `mask` is 1.0 on valid tokens and 0.0 after the last), G group size.
Losses are sums divided by `n_tokens`, the number of valid tokens of the whole mini-batch over all micro-batches and
processes: how a mini-batch is cut into pieces then changes nothing.
"""

from typing import NamedTuple

import torch


class TokenRewards(NamedTuple):
    rewards: torch.Tensor  # (B, T) -kl_coef * kl, plus the score on the last valid token
    kl: torch.Tensor  # (B, T) log pi - log pi_ref of the sampled tokens (k1)


class Advantages(NamedTuple):
    advantages: torch.Tensor  # (B, T)
    returns: torch.Tensor  # (B, T) targets of the value head: advantages + values


class PolicyLoss(NamedTuple):
    loss: torch.Tensor  # scalar
    ratio: torch.Tensor  # (B, T) pi / pi_old of the sampled tokens
    clipped: torch.Tensor  # (B, T) 1.0 where the clipped term is the larger


class ValueLoss(NamedTuple):
    loss: torch.Tensor  # scalar
    clipped: torch.Tensor  # (B, T)


class Shift(NamedTuple):
    """How far an update moved the policy, read off the sampled tokens; all are Python floats."""

    surrogate_gain: float  # mean of (ratio - 1) * advantage
    mean_kl: float  # KL(pi_old || pi_new), the k3 estimate, which is never negative (Schulman, 2020)
    max_kl: float  # its largest token: noisy, an indicator and not the supremum over states of the bound
    mean_tv: float  # half the mean of |ratio - 1|: unbiased for the total variation, averaged over states
    max_tv: float


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T) over the valid tokens; NaN where there are none (an empty set has no mean)."""
    return (values * mask).sum() / mask.sum()


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(B, T) with mean 0 (the old mean without `shift_mean`) and variance 1 over the valid tokens, 0 elsewhere.

    The variance is the population's, as in Ziegler et al. (2019); constant values come out as 0, not as NaN.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """(B,) index of the last valid token of each row; every row has at least one."""
    return mask.sum(dim=1).long() - 1


def token_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> TokenRewards:
    """R = score - kl_coef * KL(pi || pi_ref), spread over tokens (Bachu et al., 2025, section 4; Ouyang et al., 2022,
    equation 2).

    Args:
        scores: (B,) of whole answers.
        logprobs: (B, T) of the policy that sampled.
        ref_logprobs: (B, T) of the reference, the policy with its adapter off.
    """
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coef * kl
    rewards[torch.arange(len(scores)), last_token(mask)] += scores
    return TokenRewards(rewards, kl)


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation, Schulman et al. (2016) equation 16; the value after the last token is 0."""
    values, rewards = values * mask, rewards * mask
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], dim=1)
    deltas = rewards + gamma * following - values  # (B, T)
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        running = (deltas[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return Advantages(advantages, (advantages + values) * mask)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    n_tokens: float,
    cliprange: float,
    cliprange_high: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate, Schulman et al. (2017) equation 7, in Bachu et al. (2025) at an exit.

    Args:
        cliprange_high: upper range where it differs from the lower one (clip-higher, Yu et al., 2025).
    """
    high = cliprange if cliprange_high is None else cliprange_high
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + high)
    loss = (torch.maximum(plain, clipped) * mask).sum() / n_tokens
    return PolicyLoss(loss, ratio, (clipped > plain).float() * mask)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    n_tokens: float,
    cliprange_value: float,
) -> ValueLoss:
    """(V - R)^2 (Bachu et al., 2025, section 4), the larger of plain and clipped (Schulman et al.'s reference code)."""
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # `values` itself within the range
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = (torch.maximum(plain, clipped) * mask).sum() / n_tokens
    return ValueLoss(loss, (clipped > plain).float() * mask)


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T) estimate of KL(pi || pi_ref) per sampled token, exp(d) - 1 - d with d = log pi_ref - log pi."""
    d = (ref_logprobs - logprobs) * mask
    return torch.expm1(d) - d


def shift(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Shift:
    """What an update did, beside the TRPO bound of Bachu et al. (2025) (its penalty is infinite at gamma = 1, so the
    parts are reported and not the bound)."""
    change = (logprobs - old_logprobs) * mask
    ratio = change.exp()
    kl = (ratio - 1 - change) * mask
    tv = 0.5 * (ratio - 1).abs() * mask
    gain = masked_mean((ratio - 1) * advantages, mask)
    return Shift(
        float(gain), float(masked_mean(kl, mask)), float(kl.max()), float(masked_mean(tv, mask)), float(tv.max())
    )


def group_advantages(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """(B,) score minus the mean of its group, over the group's deviation: GRPO, Shao et al. (2024), section 4.1.2.

    Args:
        scores: (B,), the `group_size` answers to one request side by side.

    A group whose scores are all alike gets 0: there is nothing to learn from it.
    """
    groups = scores.view(-1, group_size)  # (B/G, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True, correction=0) + 1e-6)).flatten()


def dpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """(N,) -log sigma(beta * (margin of the policy - margin of the reference)): Rafailov et al. (2023) equation 7.

    Args:
        chosen: (N,) summed log-probabilities of the preferred answers; the others likewise.
    """
    return -torch.nn.functional.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))


def adapt_kl_coef(kl_coef: float, kl: float, target: float, n_samples: int, horizon: int) -> float:
    """The next coefficient of the adaptive controller, Ziegler et al. (2019) section 2.2.

    Args:
        kl: mean KL of a whole answer in the last batch, in nats.
        target: the KL to hold, in nats.
        horizon: samples over which the coefficient may change by a factor of e^0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_samples / horizon)
