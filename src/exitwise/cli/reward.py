"""The commands `exitwise reward train` and `exitwise reward eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..rewards.config import RewardConfig
from .console import Bar


@dataclass(frozen=True)
class RewardTrain:
    """Train a reward model on preference pairs (HH-RLHF format, or rows with prompt, chosen, rejected).

    The same command again resumes a stopped training.
    """

    config: tyro.conf.OmitArgPrefixes[RewardConfig]
    out: Path | None = None
    """Run directory; default: runs/reward-<name of the backbone>."""

    def run(self) -> None:
        from ..rewards.evaluation import table
        from ..rewards.training import train_reward

        out = self.out or Path("runs") / f"reward-{Path(self.config.backbone).resolve().name}"
        with Bar() as bar:
            metrics = train_reward(self.config, out, bar)
        print(table(metrics))
        print(f"reward model: {out}")


@dataclass(frozen=True)
class RewardEval:
    """Evaluate a reward model on preference pairs: accuracy, margin and calibration, overall and by category."""

    reward: Annotated[str, tyro.conf.Positional]
    """builtin, a folder made by `exitwise reward train`, or the hub id of a published reward model."""
    pairs: tuple[str, ...]
    """Files of preference pairs, or hub data sets such as Anthropic/hh-rlhf:harmless-base/test."""
    template: str | None = None
    """Text format of a published reward model whose id is not known: human-assistant or question."""
    limit: int | None = None
    """Maximum number of pairs read from each file."""
    out: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> None:
        from ..rewards.evaluation import evaluate_reward, table

        with Bar() as bar:
            print(table(evaluate_reward(self.reward, self.pairs, self.template, self.limit, self.out, bar)))


@dataclass(frozen=True)
class RewardCommand:
    """Train or evaluate a reward model, whose score reinforcement learning maximises."""

    command: (
        Annotated[RewardTrain, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[RewardEval, tyro.conf.subcommand("eval", prefix_name=False)]
    )

    def run(self) -> None:
        self.command.run()
