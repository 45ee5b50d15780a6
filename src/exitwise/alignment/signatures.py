"""Failure signatures of a training: named patterns in its metrics.

The thresholds are our choice, set so that runs that learn do not reach them; each is explained in
docs/reference/training-metrics.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .records import Metrics

KL_PER_ANSWER = 25.0
"""KL between policy and reference over a whole answer, in nats."""

LOOP_SHARE = 0.5
"""Refused share of the harmless requests in the window."""

COLLAPSE_DISTINCT = 0.25
"""Distinct answers over answers: below this the policy gives a few answers to every prompt."""

ENTROPY_SHARE = 0.1
"""Share of the entropy of the first steps."""

INCOHERENT_SHARE = 0.3
"""Incoherent share of the answers in the window."""

REWARD_GAIN = 0.5
"""Rise of the mean score, in the units of the reward model (the built-in one has standard deviation 1)."""

ASR_GAIN = 0.05
"""Fall of ASR."""

WINDOW = 3
"""Number of steps that are averaged: a single batch is too noisy."""


class Signature(NamedTuple):
    name: str
    message: str


def find(history: Sequence[Metrics]) -> list[Signature]:
    """The signatures that the last steps of a training show; [] while there are fewer than WINDOW steps.

    Args:
        history: the metrics of all steps so far.
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


def _reward_bias(history: Sequence[Metrics]) -> list[Signature]:
    """The score of harmful requests rose and their ASR did not fall: the reward model likes something else."""
    if len(history) < 3 * WINDOW:
        return []
    early, late = history[:WINDOW], history[-WINDOW:]
    rise = _difference(early, late, "rollout/harmful_score")
    fall = _difference(late, early, "rollout/asr")
    if rise is None or fall is None:
        return []
    if rise > REWARD_GAIN and fall < ASR_GAIN:
        return [Signature("reward-model bias", f"the score rose by {rise:.2f} and ASR fell by {100 * fall:.0f} points")]
    return []


def _mean(rows: Sequence[Metrics], key: str) -> float | None:
    """Over the rows that have it; None where none has."""
    values = [value for row in rows if (value := row.get(key)) is not None]
    return sum(values) / len(values) if values else None


def _difference(first: Sequence[Metrics], second: Sequence[Metrics], key: str) -> float | None:
    """The second mean minus the first."""
    before, after = _mean(first, key), _mean(second, key)
    return None if before is None or after is None else after - before
