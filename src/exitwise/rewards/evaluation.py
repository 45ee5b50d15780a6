"""Measures a reward model on preference pairs: accuracy, margin, calibration error, Brier score.

Shapes: N pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data.preferences import Preference
from ..errors import UserError
from ..measure.stats import wilson
from ..run.directory import write_json
from ..run.figures import Interval
from ..run.progress import Progress, Silent
from .loading import load_reward
from .pairs import load_pairs
from .protocol import LogitRewardModel

CALIBRATION_BINS = 10
ALL = "all"


class PairMeasures(NamedTuple):
    """What a reward model gets right on n pairs."""

    n: int
    accuracy: Interval
    """Share of pairs whose chosen answer scores higher; a tie is lost."""
    margin: float
    """Mean of r(chosen) - r(rejected), in log odds."""
    calibration_error: float
    brier: float
    """Mean of (1 - σ(margin))²."""


def to_json(measures: Mapping[str, PairMeasures]) -> dict[str, dict[str, object]]:
    """metrics.json: the figures by category."""
    return {name: {**row._asdict(), "accuracy": asdict(row.accuracy)} for name, row in measures.items()}


def evaluate_reward(
    reward: str,
    pairs: str | Sequence[str],
    template: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, PairMeasures]:
    """Loads a reward model and preference pairs, and returns (and writes) the figures; `exitwise reward eval`.

    Args:
        reward: as `load_reward` takes it.
        pairs: files, or data sets on the hub.
        template: text format of a published reward model whose id is not known.
        limit: maximum number of pairs read from each file.
        out: JSON file to write the figures to.

    Raises:
        UserError: the reward model or a file of pairs cannot be used, or `out` is a folder.
    """
    if not pairs:
        raise UserError("--pairs got nothing; expected files of preference pairs, or hub ids")
    if out and out.is_dir():
        raise UserError(f"--out got {out}, which is a folder; expected a JSON file for the figures")
    sources = (pairs,) if isinstance(pairs, str) else pairs
    loaded = load_pairs(sources, limit, progress or Silent())
    measures = evaluate(load_reward(reward, template=template), loaded)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, to_json(measures))
    return measures


def evaluate(reward: LogitRewardModel, pairs: Sequence[Preference]) -> dict[str, PairMeasures]:
    """`measure` of a reward model on these pairs."""
    return measure(margins_of(reward, pairs)[0], [pair.category for pair in pairs])


def margins_of(reward: LogitRewardModel, pairs: Sequence[Preference]) -> tuple[np.ndarray, torch.Tensor]:
    """(N,) log odds that the chosen answer is preferred, and the (2N,) scores before normalisation."""
    prompts = [pair.prompt for pair in pairs]
    logits = reward.logits(prompts * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    chosen, rejected = logits.double().chunk(2)
    return (chosen - rejected).numpy(), logits


def measure(margins: np.ndarray, categories: Sequence[str]) -> dict[str, PairMeasures]:
    """Figures of all pairs (key "all"), then by category.

    Args:
        margins: (N,) log odds that the chosen answer is preferred.
        categories: of the N pairs; "" is in "all" only.
    """
    groups: dict[str, np.ndarray] = {ALL: np.ones(len(margins), dtype=bool)}
    for name in sorted(set(categories) - {""}):
        groups[name] = np.array([category == name for category in categories])
    return {name: _measures(margins[rows]) for name, rows in groups.items()}


def _measures(margins: np.ndarray) -> PairMeasures:
    chances = 1 / (1 + np.exp(-margins))  # that the chosen answer is preferred (Bradley and Terry)
    return PairMeasures(
        n=len(margins),
        accuracy=wilson(int((margins > 0).sum()), len(margins)),
        margin=float(margins.mean()),
        calibration_error=calibration_error(chances),
        brier=float(((1 - chances) ** 2).mean()),
    )


def calibration_error(chances: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, eq. 3) of a model that names the better answer.

    Its confidence is max(p, 1 - p), so the bins divide [0.5, 1] into equal parts; it is right where p > 0.5.

    Args:
        chances: (N,) p that the chosen answer is the better one; N > 0.
    """
    confidence, right = np.maximum(chances, 1 - chances), chances > 0.5
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(right[bin_of == b].mean() - confidence[bin_of == b].mean()) * (bin_of == b).sum() for b in set(bin_of)]
    return float(sum(gaps) / len(chances))


def mean_and_spread(scores: torch.Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of (N,) scores; a deviation of 0 becomes 1, as there is nothing to scale."""
    spread = float(scores.double().std(correction=0))
    return float(scores.double().mean()), spread if np.isfinite(spread) and spread > 0 else 1.0


def table(measures: Mapping[str, PairMeasures]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| category | pairs | accuracy | mean margin | calibration error | Brier |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in measures.items():
        lines.append(
            f"| {name} | {row.n} | {_percent(row.accuracy)} | {row.margin:.2f} | {row.calibration_error:.3f} "
            f"| {row.brier:.3f} |"
        )
    return "\n".join(lines)


def _percent(share: Interval) -> str:
    if share.value is None or share.low is None or share.high is None:
        return "-"
    return f"{100 * share.value:.1f} % ({100 * share.low:.0f}-{100 * share.high:.0f})"
