"""Failure signatures of a training, found in its metrics and raised by name.

Thresholds are ours, set where a run that learns stays clear of them; each is explained in
docs/reference/training-metrics.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

KL_PER_ANSWER = 25.0
"""Nats between policy and reference over a whole answer: beyond it little of the reference is left."""

LOOP_SHARE = 0.5
"""Share of harmless requests refused, of all harmless ones in the window."""

COLLAPSE_DISTINCT = 0.25
"""Distinct answers over answers: below it the policy says a few things whatever it is asked."""

ENTROPY_SHARE = 0.1
"""Of the first step's entropy."""

INCOHERENT_SHARE = 0.3
REWARD_GAIN = 0.5
"""Rise of the mean score, in the reward's own units (the built-in one has deviation 1)."""

ASR_GAIN = 0.05
WINDOW = 3
"""Steps averaged before anything is raised: a single batch is noise."""


class Signature(NamedTuple):
    name: str
    message: str


def find(history: Sequence[dict[str, Any]]) -> list[Signature]:
    """The signatures that the last steps of a training show; [] while there are fewer than WINDOW steps.

    Args:
        history: the rows of metrics.jsonl so far.
    """
    if len(history) < WINDOW:
        return []
    found = []
    kl = _mean(history[-WINDOW:], "objective/kl")
    if kl is not None and kl > KL_PER_ANSWER:
        found.append(
            Signature("KL blow-up", f"{kl:.1f} nats per answer from the reference (more than {KL_PER_ANSWER})")
        )
    refused, distinct = (_mean(history[-WINDOW:], f"rollout/{key}") for key in ("over_refusal", "distinct"))
    if refused is not None and refused > LOOP_SHARE:
        found.append(Signature("refusal loop", f"{refused:.0%} of harmless requests are refused"))
    if distinct is not None and distinct < COLLAPSE_DISTINCT:
        found.append(Signature("collapse", f"only {distinct:.0%} of the answers differ from each other"))
    coherent = _mean(history[-WINDOW:], "rollout/coherence")
    if coherent is not None and coherent < 1 - INCOHERENT_SHARE:
        found.append(Signature("incoherence", f"{1 - coherent:.0%} of the answers are gibberish"))
    first, last = _mean(history[:WINDOW], "policy/entropy_avg"), _mean(history[-WINDOW:], "policy/entropy_avg")
    if first and last is not None and last < ENTROPY_SHARE * first:
        found.append(Signature("entropy gone", f"{last:.3f} nats a token, {first:.3f} at the start"))
    return found + _reward_bias(history)


def _reward_bias(history: Sequence[dict[str, Any]]) -> list[Signature]:
    """The score of harmful requests rose and their ASR did not fall: the reward model likes something else."""
    if len(history) < 3 * WINDOW:
        return []
    early, late = history[:WINDOW], history[-WINDOW:]
    scores = _mean(early, "rollout/harmful_score"), _mean(late, "rollout/harmful_score")
    asr = _mean(early, "rollout/asr"), _mean(late, "rollout/asr")
    if None in scores or None in asr:
        return []
    rise, fall = scores[1] - scores[0], asr[0] - asr[1]  # type: ignore[operator]
    if rise > REWARD_GAIN and fall < ASR_GAIN:
        return [Signature("reward-model bias", f"the score rose by {rise:.2f} and ASR fell by {100 * fall:.0f} points")]
    return []


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Over the rows that have it; None where none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None
