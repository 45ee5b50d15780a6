"""Options of reward training."""

from dataclasses import dataclass
from math import inf

from tyro.conf import Positional

from ..errors import UserError, check_ranges


@dataclass(frozen=True)
class RewardConfig:
    """What a reward model is trained on, and how; every field lands in config.json."""

    backbone: Positional[str]
    """testbed, a folder or a hub id: a vision-language model (its language model is taken) or a text model."""
    pairs: tuple[str, ...]
    """Files of preference pairs, or data sets on the hub such as Anthropic/hh-rlhf:harmless-base."""
    held_out: tuple[str, ...] = ()
    """Files of pairs to measure on; without any, a share of the prompts is kept out of training."""
    held_out_share: float = 0.15
    """That share; every pair of a prompt goes the same way."""
    limit: int | None = None
    """Take only so many pairs of each file."""
    tuning: str = "lora"
    """lora (an adapter; shares the policy's backbone) or full (all weights of the language model)."""
    rank: int = 8
    """Of LoRA; its scale is twice the rank."""
    lr: float | None = None
    """Peak learning rate of AdamW; without it, 1e-3 for lora and 1e-5 for full."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls to 0 as a cosine."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Longer gradients are cut to this."""
    epochs: int = 1
    """Times every pair is seen. Reward models overfit soon: more than one is seldom better."""
    batch_size: int = 16
    """Pairs of an optimizer step."""
    micro_tokens: int = 1024
    """Tokens of one forward and backward pass, padding included; bounds the memory, and changes no gradient."""
    max_length: int = 512
    """Tokens of a dialogue with its answer; of what is longer the end is kept."""
    checkpoint_every: int = 20
    """Steps."""
    seed: int = 0
    """Of the split, the order of the pairs and the adapter's first weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is the first GPU where there is one."""

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
