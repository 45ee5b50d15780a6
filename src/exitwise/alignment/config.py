"""Options of an alignment. tyro makes the command line from this class; config.json holds its fields."""

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
"""Default of --eval-every with --schedule worst, whose weights follow the small audits."""


@dataclass(frozen=True)
class AlignConfig:
    """Options of an alignment; config.json holds every field."""

    model: Positional[str]
    """testbed, or a folder or Hugging Face hub id of a model of a supported family (docs/reference/families.md)."""
    method: Literal["l-ppo", "grpo", "sft", "dpo"] = "l-ppo"
    """Training method: l-ppo (Bachu et al., 2025), or a baseline with the same data, exits, steps and adapter."""
    exits: str = "default"
    """Exits to train at: all, default, early, middle, late, numbers and ranges, separated by commas. Layers joined by +
    are one exit that fuses them: 3+18+23."""
    hold_out: str = ""
    """Exits to leave out of --exits, so that an audit can measure the effect of the training on other exits."""
    schedule: Literal["random", "each", "worst"] = "random"
    """How prompts are assigned to exits: random draws one exit per prompt; each uses every exit for every prompt; worst
    draws with weights that follow ASR in the latest audit, so that the exit with the highest ASR gets most prompts
    (minimax)."""
    audit: Path | None = None
    """Run directory of `exitwise audit` of this model; its ASR sets the first weights of --schedule worst."""
    inputs: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    mix: tuple[float, float, float] = (0.5, 0.25, 0.25)
    """Shares of harmful prompts, harmless prompts and VQA questions in a batch; the paper uses 1 0 0."""
    anchor: tuple[float, float] = (0.5, 1.0)
    """Shares of the harmless prompts and of the VQA questions that are used at the default exit, to keep its behaviour.
    An early exit may not show what a VQA question asks for; training on it there teaches the model to guess."""
    refusal_cost: float = 1.0
    """Penalty for refusing a harmless prompt: the score is minus this value, against 1 for an answer."""
    reward: str = "builtin"
    """Reward model that scores answers to harmful prompts: builtin (for the testbed), a folder made by `exitwise reward
    train`, a hub id of a sequence classifier with one label, or matcher (the rule that also measures ASR)."""
    reward_template: str | None = None
    """Text format of a published reward model whose id is not known: human-assistant or question."""
    steps: int = 100
    """Number of training steps: a rollout of a batch, then updates on it."""
    batch_size: int = 32
    """Answers per step."""
    max_new_tokens: int = 24
    """Maximum length of an answer, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of rollouts. Probability ratios and the KL are computed at temperature 1."""
    num_ppo_epochs: int = 2
    """Passes over the batch in a step."""
    num_mini_batches: int = 2
    """Mini-batches per pass; each gives one optimizer update."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per mini-batch; only one is in memory at a time. A larger number needs less memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory. Rows that share an image then no longer share its
    computation, which is slower."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup: int = 2
    """Number of steps in which the learning rate rises to --lr; afterwards it falls linearly to a tenth of it."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down to it."""
    lora_rank: int = 16
    """LoRA rank."""
    lora_alpha: float = 32.0
    """LoRA alpha; the adapter is scaled by alpha / rank."""
    kl_coef: float = 0.05
    """Weight of the KL divergence from the model before training, per token. With 0 the policy can collapse to whatever
    the reward model prefers."""
    kl_target: float | None = None
    """Target KL per answer, in nats; --kl-coef is adapted to reach it. Without it, --kl-coef stays constant."""
    kl_horizon: int = 10_000
    """Number of answers over which an adaptive --kl-coef changes by at most a factor of e^0.2."""
    gamma: float = 1.0
    """Discount factor of rewards, per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: float = 0.2
    """PPO clip range of the probability ratio."""
    cliprange_high: float | None = None
    """Upper clip range of the probability ratio, if it differs from --cliprange (clip-higher: 0.28)."""
    cliprange_value: float = 0.2
    """Clip range of the value predictions."""
    vf_coef: float = 0.1
    """Weight of the value loss (c1 in the paper)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss."""
    target_kl: float | None = None
    """End the updates of a step early once the policy moved by this KL per token."""
    whiten_rewards: bool = False
    """Divide the rewards of a batch by their standard deviation."""
    reward_clip: float | None = None
    """Clip scores to the range from minus this value to this value."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of an answer cut at --max-new-tokens."""
    group_size: int = 4
    """Answers per prompt in GRPO."""
    dpo_beta: float = 0.1
    """Beta of the DPO loss."""
    probe: int = 16
    """Number of fixed harmful prompts that L-PPO answers before and after the updates of each step, to measure the
    return; 0 for none."""
    best_of: int = 8
    """Answers per prompt in the estimate of the regret against best-of-n at the end of L-PPO and GRPO; 0 for none."""
    eval_every: int = 0
    """Steps between two small audits of the trained exits; there is none after the last step. 0 for none, but 10 with
    --schedule worst."""
    eval_prompts: int = 24
    """Number of harmful training prompts in a small audit; with --validation, those prompts are used instead."""
    validation: int = 0
    """Number of harmful prompts, and of harmless ones, that are kept out of training and used in the small audits."""
    samples_every: int = 5
    """Steps between two batches of answers written to answers.jsonl."""
    checkpoint_every: int = 5
    """Steps between two checkpoints; the newest two are kept."""
    features: Path | None = None
    """Folder for the image features, which several runs can share; without it, they are in the run directory."""
    seed: int = 0
    """Random seed of the data order, of the assignment to exits, of sampling and of the initial weights."""
    dtype: str = "auto"
    """Precision of the model: float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's elsewhere."""
    device: str = "auto"
    """Device to run the model on: cpu, cuda, cuda:1 ..., or auto (the first GPU, else the CPU)."""
    tracker: str | None = None
    """Experiment tracker that accelerate supports (tensorboard, wandb, mlflow ...), in addition to metrics.jsonl."""
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
            raise UserError(f"--anchor got {self.anchor}; expected two shares between 0 and 1")
        if min(self.mix) < 0 or not abs(sum(self.mix) - 1) <= 1e-6:
            raise UserError(f"--mix got {self.mix}; expected three shares that add up to 1")
        if not self.mix[0] and self._measures_harmful():
            raise UserError(
                f"--mix got {self.mix}, without harmful prompts, which --probe, --best-of, --eval-every and --schedule "
                "worst need; give a share of harmful prompts, or --probe 0 --best-of 0 and neither of the others"
            )
        pieces = self.num_mini_batches * self.gradient_accumulation_steps
        if self.batch_size % pieces:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be divided into {self.num_mini_batches} mini-batches of "
                f"{self.gradient_accumulation_steps} micro-batches; give a multiple of {pieces}"
            )
        if self.kl_target is not None and self.kl_horizon < self.batch_size:
            raise UserError(
                f"--kl-horizon {self.kl_horizon} is less than --batch-size {self.batch_size}; give at least that, so "
                "that one batch changes --kl-coef by at most 20 %"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise UserError("--kl-target multiplies --kl-coef, which is 0 and would stay 0; give a positive --kl-coef")
        if self.reward_template is not None and self.reward in ("builtin", "matcher"):
            raise UserError(
                f"--reward-template is for published reward models, not for --reward {self.reward}; leave it out"
            )
        if self.method == "grpo" and self.batch_size % self.group_size:
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --group-size {self.group_size}")
        if self.validation and not 0 < self.audited_every() < self.steps:
            raise UserError("--validation keeps prompts for the small audits; give --eval-every too, less than --steps")
        if self.audit is not None and self.schedule != "worst":
            raise UserError("--audit sets the first weights of --schedule worst; give both or neither")

    def _measures_harmful(self) -> bool:
        """Whether a measurement besides the batches uses harmful prompts."""
        probed = self.probe and self.method == "l-ppo"
        drawn = self.best_of and self.method in ("l-ppo", "grpo")
        return bool(probed or drawn or self.audited_every())

    def audited_every(self) -> int:
        """Steps between two small audits of the trained exits; 0 for none."""
        return self.eval_every or (EVAL_EVERY_WORST if self.schedule == "worst" else 0)
