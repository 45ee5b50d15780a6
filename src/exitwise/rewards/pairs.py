"""Splits preference pairs into training and held-out pairs, by prompt."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from ..data.preferences import Preference, load_preferences
from ..errors import UserError
from ..run.progress import Progress
from .config import RewardConfig


class PairSplit(NamedTuple):
    train: list[Preference]
    held_out: list[Preference]


def split_by_prompt(pairs: Sequence[Preference], share: float, seed: int) -> PairSplit:
    """Holds out about `share` of the prompts, at least one, with all their pairs; both parts keep the order given.

    Raises:
        UserError: there is only one prompt.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise UserError("the pairs have one prompt only, so none can be held out; give more, or --held-out FILE")
    n = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    chosen = set(random.Random(seed).sample(prompts, n))
    return PairSplit([p for p in pairs if p.prompt not in chosen], [p for p in pairs if p.prompt in chosen])


def load_split(config: RewardConfig, progress: Progress) -> PairSplit:
    """The pairs of a config. Raises UserError where a prompt of the held-out files is also trained on."""
    pairs = load_pairs(config.pairs, config.limit, progress)
    if not config.held_out:
        return split_by_prompt(pairs, config.held_out_share, config.seed)
    held_out = load_pairs(config.held_out, config.limit, progress)
    both = sorted({p.prompt for p in pairs} & {p.prompt for p in held_out})
    if both:
        raise UserError(
            f"{len(both)} prompts are in both --pairs and --held-out, first {both[0][:60]!r}; remove them from one"
        )
    return PairSplit(pairs, held_out)


def load_pairs(sources: Sequence[str], limit: int | None, progress: Progress) -> list[Preference]:
    """The pairs of all sources, at most `limit` of each; skipped rows are printed with their reason."""
    pairs: list[Preference] = []
    for source in sources:
        loaded = load_preferences(source, limit)
        for line in loaded.skipped:
            progress.say(f"skipped {line}")
        pairs += loaded.pairs
    return pairs
