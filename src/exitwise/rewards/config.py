"""Options of reward training."""

from dataclasses import dataclass
from math import inf

from tyro.conf import Positional

from ..errors import UserError, check_ranges


@dataclass(frozen=True)
class RewardConfig:
    """Options of `exitwise reward train`; every field is written to config.json."""

    backbone: Positional[str]
    """Model to train on: testbed, a folder or a hub id of a text model, or of a vision-language model, whose language
    model is used."""
    pairs: tuple[str, ...]
    """Files of preference pairs, or hub data sets such as Anthropic/hh-rlhf:harmless-base."""
    held_out: tuple[str, ...] = ()
    """Files of pairs to evaluate on. Default: --held-out-share of the prompts in --pairs, which are not trained on."""
    held_out_share: float = 0.15
    """Share of the prompts held out, each with all its pairs; unused with --held-out."""
    limit: int | None = None
    """Maximum number of pairs read from each file."""
    tuning: str = "lora"
    """lora (an adapter, which shares the policy's backbone) or full (all weights of the language model)."""
    rank: int = 8
    """LoRA rank; LoRA's alpha is twice the rank."""
    lr: float | None = None
    """Peak learning rate of AdamW. Default: 1e-3 for lora, 1e-5 for full."""
    warmup: float = 0.1
    """Share of the steps with a rising learning rate; after them it falls to 0 along a cosine."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    epochs: int = 1
    """Passes over the pairs. Reward models overfit quickly: more than one is rarely better."""
    batch_size: int = 16
    """Pairs in one optimizer step."""
    micro_tokens: int = 1024
    """Maximum number of tokens in one forward and backward pass, padding included. Limits memory, not the gradient."""
    max_length: int = 512
    """Maximum number of tokens of a dialogue with its answer; of a longer one the end is kept."""
    checkpoint_every: int = 20
    """Optimizer steps between two checkpoints."""
    seed: int = 0
    """Random seed of the split, the order of the pairs and the adapter's initial weights."""
    device: str = "auto"
    """Device to run the model on: cpu, cuda, cuda:1 ..., or auto (the first GPU, else the CPU)."""

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        if not self.pairs:
            raise UserError("--pairs got nothing; expected files of preference pairs, or hub ids")
        if self.tuning not in ("lora", "full"):
            raise UserError(f"--tuning got {self.tuning!r}; expected lora or full")
        ranges: tuple[tuple[str, float, float], ...] = (
            ("held_out_share", 0.01, 0.9),
            ("limit", 1, 10**9),
            ("rank", 1, 1024),
            ("lr", 1e-9, 1),
            ("warmup", 0, 1),
            ("weight_decay", 0, 10),
            ("max_grad_norm", 1e-9, inf),
            ("epochs", 1, 1000),
            ("batch_size", 1, inf),
            ("micro_tokens", 1, inf),
            ("max_length", 8, inf),
            ("checkpoint_every", 1, inf),
            ("seed", 0, inf),
        )
        check_ranges(self, ranges)
