"""checkpoint.safetensors of a reward training: weights, AdamW's moments and the step, written whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..model.features import writing

MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
"""Prefix in the file -> key in AdamW's state."""


def save_checkpoint(
    path: Path, step: int, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Writes weights and AdamW's moments after `step` steps."""
    tensors = {}
    for name, weight in weights.items():
        state = optimizer.state[weight]
        tensors[f"weight/{name}"] = weight.data.contiguous()
        for key, moment in MOMENTS.items():
            # layers that run only where there is an image (mllama) have no moments
            tensors[f"{key}/{name}"] = state[moment].contiguous() if moment in state else torch.zeros_like(weight.data)
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        save_file(tensors, scratch, metadata={"step": str(step)})
    with open(scratch, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(scratch, path)


def load_checkpoint(path: Path, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Restores weights and moments; returns the number of steps done, 0 where there is no checkpoint.

    Raises:
        UserError: the checkpoint is broken.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            for name, weight in weights.items():
                weight.data.copy_(file.get_tensor(f"weight/{name}"))
                moments = {
                    moment: file.get_tensor(f"{key}/{name}").to(weight.device) for key, moment in MOMENTS.items()
                }
                optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is broken ({error}); delete it to begin again") from None
    return step
