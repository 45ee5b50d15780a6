"""What an alignment can be asked. The command line is made from this class (tyro), and config.json holds its fields."""

from dataclasses import dataclass, field
from math import inf
from os import PathLike
from pathlib import Path
from typing import Literal, Self

from tyro.conf import OmitArgPrefixes, Positional

from ..data.config import DataConfig
from ..data.options import make_config
from ..errors import UserError, check_ranges

VQA_QUESTIONS = 1200
"""Questions drawn from each VQA set; easy-VQA has 38,575, and an alignment uses a few hundred."""

EVAL_EVERY_WORST = 10
"""Steps between two small audits under --schedule worst, which follows them."""


@dataclass(frozen=True)
class AlignConfig:
    """What an alignment asks; every field lands in config.json."""

    model: Positional[str]
    """testbed, a folder or a hub id of a model of any supported family (docs/reference/families.md)."""
    method: Literal["l-ppo", "grpo", "sft", "dpo"] = "l-ppo"
    """l-ppo (Bachu et al.); the others are baselines on the same data, exits, steps and adapter."""
    exits: str = "default"
    """Exits to train at: all, default, early, middle, late, numbers and ranges, separated by commas."""
    hold_out: str = ""
    """Exits to leave out of --exits, so that an audit can show what training elsewhere did to them."""
    schedule: Literal["random", "each", "worst"] = "random"
    """How prompts meet exits: one drawn per prompt; every prompt at each exit; or drawn with weights that follow the
    last audit, most at the exit with the highest ASR (minimax)."""
    audit: Path | None = None
    """A run directory of `exitwise audit` of this model: first weights of --schedule worst."""
    inputs: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    mix: tuple[float, float, float] = (0.5, 0.25, 0.25)
    """Shares of harmful prompts, harmless prompts and VQA questions in a batch; 1 0 0 is the paper's."""
    anchor: tuple[float, float] = (0.5, 1.0)
    """Shares of the harmless prompts and of the VQA questions asked at the default exit, to keep it as it is. A
    question about an image that an early exit does not show teaches guessing, at the default exit too."""
    refusal_cost: float = 1.0
    """A refused harmless prompt scores minus this, an answered one 1."""
    reward: str = "builtin"
    """Who scores harmful prompts' answers: builtin (the testbed's own), a run of `exitwise reward train`, a hub id of a
    sequence classifier with one label, or matcher (the rule that also measures ASR)."""
    reward_template: str | None = None
    """How a published reward model wants its texts, where its id is not known: human-assistant or question."""
    steps: int = 100
    """Rollouts, each followed by its updates."""
    batch_size: int = 32
    """Answers in a rollout."""
    max_new_tokens: int = 24
    """Tokens of an answer at the most."""
    temperature: float = 1.0
    """Of sampling; ratios and KL are those of temperature 1."""
    num_ppo_epochs: int = 2
    """Passes over a rollout."""
    num_mini_batches: int = 2
    """Updates in a pass."""
    gradient_accumulation_steps: int = 1
    """Pieces of a mini-batch that are in memory one at a time."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them; prefixes are then not shared."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup: int = 2
    """Steps until the peak; afterwards it falls linearly to a tenth."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    lora_rank: int = 16
    """Of the adapter."""
    lora_alpha: float = 32.0
    """Of the adapter."""
    kl_coef: float = 0.05
    """Weight of the KL to the policy before training; 0 lets the policy collapse if the reward lets it."""
    kl_target: float | None = None
    """Adapt kl_coef to hold this KL per answer, in nats."""
    kl_horizon: int = 10_000
    """Samples over which the adaptive kl_coef may change by a factor of e^0.2."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Of generalised advantage estimation."""
    cliprange: float = 0.2
    """Of the ratio."""
    cliprange_high: float | None = None
    """Upper clip range where it differs (clip-higher: 0.28)."""
    cliprange_value: float = 0.2
    """Of the value head."""
    vf_coef: float = 0.1
    """c1, the weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    target_kl: float | None = None
    """End a rollout's updates early once the policy moved by this KL per token."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation."""
    reward_clip: float | None = None
    """Clip scores to plus or minus this."""
    missing_eos_penalty: float | None = None
    """Take this off the score of an answer that did not end."""
    group_size: int = 4
    """Answers per request in GRPO."""
    dpo_beta: float = 0.1
    """Beta of DPO."""
    probe: int = 16
    """Requests answered before and after every update of L-PPO to measure the return; 0 for none."""
    best_of: int = 8
    """Answers per request for the regret against best-of-n, at the end of L-PPO and GRPO; 0 for none."""
    eval_every: int = 0
    """Steps between two small audits of the trained exits, none after the last step; --schedule worst takes 10 where
    this is 0."""
    eval_prompts: int = 24
    """Harmful training prompts in such an audit; none with --validation."""
    validation: int = 0
    """Harmful prompts, and as many harmless ones, kept out of training for the small audits to ask."""
    samples_every: int = 5
    """Steps between two batches of answers written to answers.jsonl."""
    checkpoint_every: int = 5
    """Steps between two checkpoints."""
    features: Path | None = None
    """Folder of image features, shared by runs; without it, in the run directory."""
    seed: int = 0
    """Of everything drawn."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto is float32 on a CPU and the checkpoint's own elsewhere."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is the first GPU where there is one."""
    tracker: str | None = None
    """A tracker that accelerate knows (tensorboard, wandb, mlflow ...), beside metrics.jsonl."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    @classmethod
    def of(cls, model: str | PathLike[str], **options: object) -> Self:
        """A config from flat keywords, those of `DataConfig` included; raises UserError for an unknown one."""
        return make_config(cls, {"model": model, **options})

    def check(self) -> None:
        """Raises UserError for a value out of range, or values that do not go together."""
        ranges: tuple[tuple[str, float, float], ...] = (
            ("steps", 1, inf), ("batch_size", 1, inf), ("max_new_tokens", 1, inf), ("temperature", 1e-3, 100),
            ("num_ppo_epochs", 1, inf), ("num_mini_batches", 1, inf), ("gradient_accumulation_steps", 1, inf),
            ("lr", 0, 1), ("warmup", 0, inf), ("max_grad_norm", 1e-9, inf), ("lora_rank", 1, inf),
            ("lora_alpha", 1e-9, inf), ("kl_coef", 0, inf), ("kl_target", 1e-9, inf), ("kl_horizon", 1, inf),
            ("gamma", 0, 1), ("lam", 0, 1), ("cliprange", 1e-9, inf), ("cliprange_high", 1e-9, inf),
            ("cliprange_value", 1e-9, inf), ("vf_coef", 0, inf), ("entropy_coef", 0, inf), ("target_kl", 1e-9, inf),
            ("refusal_cost", 0, inf), ("reward_clip", 1e-9, inf), ("missing_eos_penalty", 0, inf),
            ("group_size", 2, inf), ("dpo_beta", 1e-9, inf), ("probe", 0, inf), ("best_of", 0, inf),
            ("eval_every", 0, inf), ("eval_prompts", 1, inf), ("validation", 0, inf),
            ("samples_every", 1, inf), ("checkpoint_every", 1, inf), ("seed", 0, inf),
        )  # fmt: skip
        check_ranges(self, ranges)
        self.inputs.check()
        dtypes = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in dtypes:
            raise UserError(f"--dtype got {self.dtype!r}; expected one of: {', '.join(dtypes)}")
        if not all(0 <= share <= 1 for share in self.anchor):
            raise UserError(f"--anchor got {self.anchor}; expected two shares from 0 to 1")
        if min(self.mix) < 0 or not abs(sum(self.mix) - 1) <= 1e-6:
            raise UserError(f"--mix got {self.mix}; expected three shares that add up to 1")
        if not self.mix[0] and self._asks_harmful():
            raise UserError(
                f"--mix got {self.mix}, no share of harmful prompts, which --probe, --best-of, --eval-every and "
                "--schedule worst ask; give --probe 0 --best-of 0 and neither of the others, or a share"
            )
        pieces = self.num_mini_batches * self.gradient_accumulation_steps
        if self.batch_size % pieces:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be cut into {self.num_mini_batches} mini-batches of "
                f"{self.gradient_accumulation_steps} pieces; give a multiple of {pieces}"
            )
        if self.kl_target is not None and self.kl_horizon < self.batch_size:
            raise UserError(
                f"--kl-horizon {self.kl_horizon} is less than --batch-size {self.batch_size}; give at least that, or "
                "one batch could turn the weight of the KL around"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise UserError("--kl-target multiplies --kl-coef, and 0 stays 0; give --kl-coef to begin with")
        if self.reward_template is not None and self.reward in ("builtin", "matcher"):
            raise UserError(
                f"--reward-template is for published reward models, not for --reward {self.reward}; leave it out"
            )
        if self.method == "grpo" and self.batch_size % self.group_size:
            raise UserError(f"--batch-size {self.batch_size} is no multiple of --group-size {self.group_size}")
        if self.validation and not 0 < self.audited_every() < self.steps:
            raise UserError("--validation keeps prompts for the small audits; give --eval-every too, less than --steps")
        if self.audit is not None and self.schedule != "worst":
            raise UserError("--audit gives the first weights of --schedule worst; give both or neither")

    def _asks_harmful(self) -> bool:
        """Whether something beside the batches asks harmful prompts."""
        probed = self.probe and self.method == "l-ppo"
        drawn = self.best_of and self.method in ("l-ppo", "grpo")
        return bool(probed or drawn or self.audited_every())

    def audited_every(self) -> int:
        """Steps between two small audits of the trained exits; 0 for none."""
        return self.eval_every or (EVAL_EVERY_WORST if self.schedule == "worst" else 0)
