"""Losses of a micro-batch for L-PPO and its baselines; their formulas are in ppo.py.

Each is a sum over rows, divided by the count of the whole mini-batch, so that the micro-batches' losses add up to it.
"""

from collections.abc import Callable

import torch

from . import ppo
from .rollout import ResponseBatch, Rollout, select
from .state import Bench, State

MicroBatchLoss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""(loss, sums to log)"""
Loss = Callable[[list[int], float], MicroBatchLoss]
"""(rows of a micro-batch, valid tokens of its whole mini-batch) -> its loss"""


def ppo_loss(bench: Bench, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor) -> Loss:
    """Clipped policy loss plus c1 times the value loss (Bachu et al., 2025, section 4), less an entropy bonus."""
    config = bench.config

    def loss(rows: list[int], n_tokens: float) -> MicroBatchLoss:
        piece = select(rollout.answers, rows)
        new = bench.wrapped(*piece, bench.features, entropy_gradient=config.entropy_coef > 0)
        old, mask = rollout.old.logprobs[rows], piece.mask
        policy = ppo.policy_loss(
            new.logprobs, old, advantages[rows], mask, n_tokens, config.cliprange, config.cliprange_high
        )
        value = ppo.value_loss(
            new.values, rollout.old.values[rows], returns[rows], mask, n_tokens, config.cliprange_value
        )
        total = policy.loss + config.vf_coef * value.loss
        if config.entropy_coef:
            total = total - config.entropy_coef * (new.entropy * mask).sum() / n_tokens
        return total, {
            "loss/policy_avg": policy.loss,
            "loss/value_avg": value.loss,
            "policy/approxkl_avg": 0.5 * ((new.logprobs - old) ** 2 * mask).sum() / n_tokens,
            "policy/clipfrac_avg": policy.clipped.sum() / n_tokens,
            "val/clipfrac_avg": value.clipped.sum() / n_tokens,
            "val/ratio": (policy.ratio * mask).sum() / n_tokens,
        }

    return loss


def grpo_loss(bench: Bench, state: State, rollout: Rollout, advantages: torch.Tensor) -> Loss:
    """Shao et al. (2024) equation 3, averaged over the tokens of the mini-batch, the KL (k3) in the loss."""
    config = bench.config

    def loss(rows: list[int], n_tokens: float) -> MicroBatchLoss:
        piece = select(rollout.answers, rows)
        new = bench.wrapped(*piece, bench.features)
        old, mask = rollout.old.logprobs[rows], piece.mask
        policy = ppo.policy_loss(
            new.logprobs, old, advantages[rows], mask, n_tokens, config.cliprange, config.cliprange_high
        )
        kl = (ppo.kl_k3(new.logprobs, rollout.ref_logprobs[rows], mask) * mask).sum() / n_tokens
        return policy.loss + state.kl_coef * kl, {
            "loss/policy_avg": policy.loss,
            "loss/kl_avg": kl,
            "policy/approxkl_avg": 0.5 * ((new.logprobs - old) ** 2 * mask).sum() / n_tokens,
            "policy/clipfrac_avg": policy.clipped.sum() / n_tokens,
            "val/ratio": (policy.ratio * mask).sum() / n_tokens,
        }

    return loss


def sft_loss(bench: Bench, answers: ResponseBatch) -> Loss:
    """Negative log-likelihood, averaged over the tokens of the mini-batch."""

    def loss(rows: list[int], n_tokens: float) -> MicroBatchLoss:
        piece = select(answers, rows)
        total = -(bench.wrapped(*piece, bench.features).logprobs * piece.mask).sum() / n_tokens
        return total, {"loss/policy_avg": total}

    return loss


def dpo_loss(bench: Bench, answers: ResponseBatch, n: int, reference: torch.Tensor) -> Loss:
    """DPO over pairs i and n + i of the answers; `reference` (2n,) holds their summed log-probabilities."""
    per_batch = n // bench.config.num_mini_batches

    def loss(rows: list[int], n_tokens: float) -> MicroBatchLoss:
        bad = [i + n for i in rows]
        piece = select(answers, rows + bad)  # one forward for both
        summed = (bench.wrapped(*piece, bench.features).logprobs * piece.mask).sum(dim=1)
        chosen, rejected = summed[: len(rows)], summed[len(rows) :]
        each = ppo.dpo_loss(chosen, rejected, reference[rows], reference[bad], bench.config.dpo_beta)
        right = ((chosen - reference[rows]) > (rejected - reference[bad])).float()
        return each.sum() / per_batch, {
            "loss/policy_avg": each.sum() / per_batch,
            "dpo/accuracy": right.sum() / per_batch,
        }

    return loss
