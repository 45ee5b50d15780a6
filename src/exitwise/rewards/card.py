"""Writes the model card (README.md) of a trained reward model."""

from collections.abc import Mapping

from .config import RewardConfig
from .evaluation import PairMeasures, table


def card(config: RewardConfig, measures: Mapping[str, PairMeasures], counts: Mapping[str, int]) -> str:
    """README.md of a reward model, with its figures on the held-out pairs.

    Args:
        counts: training pairs by category.
    """
    how = f"LoRA of rank {config.rank}" if config.tuning == "lora" else "all weights"
    trained_on = ", ".join(f"{n} {name or 'of no category'}" for name, n in sorted(counts.items()))
    return f"""# Reward model on {config.backbone}

A linear head on the last token's hidden state, {how}, Bradley-Terry loss on pairs of answers. Higher is better; scores
over the held-out answers have mean 0 and deviation 1. Load it with `exitwise.load_reward`.

Trained on {sum(counts.values())} pairs ({trained_on}), {config.epochs} epoch(s), seed {config.seed}, at most
{config.max_length} tokens of a dialogue.

## Held-out pairs

No prompt of these was trained on. Accuracy: the chosen answer scores higher, with Wilson's 95 % interval. Margin: log
odds. Calibration error: of sigmoid(margin), ten bins. Brier: mean of (1 - sigmoid(margin))².

{table(measures)}

## Not good for

Answers unlike those in its pairs: a policy that is trained against a reward model finds what the model does not know.
Read the answers, not only the scores.
"""
