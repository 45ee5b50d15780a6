"""The optimizer's updates in a step: epochs of mini-batches, each accumulated over micro-batches."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch.distributed.tensor import DTensor

from ..errors import UserError
from .config import AlignConfig
from .losses import Loss
from .rollout import ResponseBatch, by_length
from .state import Bench


def update(bench: Bench, step: int, answers: ResponseBatch, n: int, loss_of: Loss) -> dict[str, float]:
    """Epochs of mini-batches over rows 0 .. n-1; returns the logged sums, averaged over mini-batches.

    With --target-kl the updates end early, once a mini-batch is that far from the policy of the rollout.

    Args:
        step: number of the step, from 0.

    Raises:
        UserError: a gradient is not finite; the policy is left as it was before that mini-batch.
    """
    config = bench.config
    logged: dict[str, float] = {}
    n_updates = 0
    for rows in _mini_batches(config, step, n):
        found = _update_once(bench, step, answers, rows, loss_of)
        n_updates += 1
        for name, value in found.items():
            logged[name] = logged.get(name, 0.0) + value
        if config.target_kl is not None and found.get("policy/approxkl_avg", 0.0) > config.target_kl:
            break
    return {name: value / n_updates for name, value in logged.items()} | {"updates": n_updates}


def set_lr(optimizer: torch.optim.Optimizer, config: AlignConfig, step: int) -> None:
    """Linear warm-up, then linear decay to a tenth; it depends on the step alone, so no checkpoint has to hold it."""
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    else:
        factor = 1 - 0.9 * (step - config.warmup) / max(1, config.steps - config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def _mini_batches(config: AlignConfig, step: int, n: int) -> Iterator[list[int]]:
    """Rows of each mini-batch; every epoch has an order of its own."""
    size = n // config.num_mini_batches
    for epoch in range(config.num_ppo_epochs):
        order = list(range(n))
        random.Random(f"{config.seed}/order/{step}/{epoch}").shuffle(order)
        for start in range(0, size * config.num_mini_batches, size):
            yield order[start : start + size]


def _update_once(bench: Bench, step: int, answers: ResponseBatch, rows: list[int], loss_of: Loss) -> dict[str, float]:
    """One optimizer step on a mini-batch, of which every process takes its share; returns the sums of all processes."""
    accelerator = bench.accelerator
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    pieces = by_length(answers, mine, bench.config.gradient_accumulation_steps)
    n_tokens = float(answers.mask[rows].sum())
    sums: dict[str, torch.Tensor] = {}
    for piece in pieces:
        last = piece is pieces[-1]
        with nullcontext() if last else accelerator.no_sync(bench.wrapped):
            loss, stats = loss_of(piece, n_tokens)
            accelerator.backward(loss * accelerator.num_processes)  # the processes' gradients are averaged
        for name, value in stats.items():
            sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + value.detach()
    norm = _clipped_norm(bench)
    if not math.isfinite(norm):
        bench.optimizer.zero_grad()
        raise UserError(
            f"step {step + 1}: the gradient norm is {norm}; the last checkpoint is kept; lower --lr, and see "
            "metrics.jsonl for the values that grew"
        )
    bench.optimizer.step()
    bench.optimizer.zero_grad()
    return {name: float(accelerator.reduce(value, "sum")) for name, value in sums.items()} | {"grad_norm": norm}


def _clipped_norm(bench: Bench) -> float:
    """Clips the gradients to --max-grad-norm; returns their norm before that."""
    # The optimizer's parameters: under FSDP2 the policy may hold gathered copies, whose gradients go elsewhere.
    parameters = [p for group in bench.optimizer.param_groups for p in group["params"]]
    norm = bench.accelerator.clip_grad_norm_(parameters, bench.config.max_grad_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
