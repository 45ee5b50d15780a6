"""What a training step works with: objects that stay the same (`Bench`), and numbers that change (`State`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import nn

from ..model.features import FeatureFiles
from ..rewards.protocol import RewardModel
from ..run.clock import Clock
from ..run.exit import Exit
from .batches import Exits, Pools
from .config import AlignConfig
from .policy import Policy

if TYPE_CHECKING:
    from accelerate import Accelerator


class Bench(NamedTuple):
    """Objects that stay the same from step to step."""

    config: AlignConfig
    accelerator: "Accelerator"
    policy: Policy
    wrapped: nn.Module
    """The policy as accelerate wraps it; every forward pass with gradients goes through it."""
    optimizer: torch.optim.Optimizer
    features: FeatureFiles
    reward: RewardModel
    """Unused by SFT and DPO."""
    pools: Pools
    exits: Exits
    clock: Clock


@dataclass
class State:
    """Contents of a checkpoint besides the weights and the optimizer's moments."""

    step: int
    kl_coef: float
    weights: dict[Exit, float]
    """Sampling weights of the trained exits, for --schedule worst."""
    measured: tuple[float, float] | None = None
    """(mean score, mean KL) of the probe after the last update."""

    def to_json(self) -> dict[str, object]:
        """The fields as state.json holds them, exits as text."""
        return vars(self) | {"weights": {str(exit): weight for exit, weight in self.weights.items()}}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The state of these fields; exitwise 0.1.0 wrote a set of layers as one long number.

        Raises:
            KeyError, TypeError, ValueError: they are not those of a state.
        """
        exits = {Exit.of(key): weight for key, weight in fields["weights"].items()}
        return cls(**{**fields, "weights": exits})
