"""Failure signatures are named by the metrics that show them, and by no others."""

import pytest

from exitwise.alignment import signatures
from exitwise.alignment.loop import align
from tests.align_setup import config_of
from tests.alignment.runs import Doing, rows_of

HEALTHY = {
    "objective/kl": 2.0, "policy/entropy_avg": 2.0, "rollout/over_refusal": 0.05, "rollout/distinct": 0.9,
    "rollout/coherence": 0.97, "rollout/harmful_score": 0.0, "rollout/asr": 0.8,
}  # fmt: skip


def history(n=12, **courses):
    """Rows of metrics; a course is the value in the first row and in the last four, straight in between."""
    rows = []
    for i in range(n):
        here = {key.replace("__", "/"): a + (b - a) * min(1, i / (n - 4)) for key, (a, b) in courses.items()}
        rows.append(HEALTHY | here)
    return rows


def names(rows):
    return [signature.name for signature in signatures.find(rows)]


LEARNS = {"rollout__harmful_score": (-1.0, 1.5), "rollout__asr": (0.9, 0.1), "objective__kl": (0.0, 8.0),
          "policy__entropy_avg": (2.0, 0.9)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "courses"),
    [
        ("KL blow-up", {"objective__kl": (0, 60)}),
        ("refusal loop", {"rollout__over_refusal": (0.0, 0.9)}),
        ("collapse", {"rollout__distinct": (1.0, 0.1)}),
        ("incoherence", {"rollout__coherence": (1.0, 0.2)}),
        ("entropy gone", {"policy__entropy_avg": (2.0, 0.01)}),
        ("reward-model bias", {"rollout__asr": (0.8, 0.8)}),
    ],
)
def test_a_signature_is_raised_by_name_and_alone(name, courses):
    assert names(history(**(LEARNS | courses))) == [name]
    assert names(history(**(LEARNS | courses))[:2]) == []  # two steps are noise
    (found,) = signatures.find(history(**(LEARNS | courses)))
    assert any(character.isdigit() for character in found.message)


def test_a_healthy_run_raises_nothing():
    whole = history(**LEARNS)
    assert [names(whole[:n]) for n in range(len(whole) + 1)] == [[]] * (len(whole) + 1)
    assert names(history()) == []


def test_one_bad_batch_raises_nothing():
    rows = history(**LEARNS)
    rows[-1] = rows[-1] | {"rollout/over_refusal": 1.0, "rollout/distinct": 0.2, "objective/kl": 40.0}
    assert names(rows) == []


def test_what_was_not_measured_raises_nothing():
    """Batches without harmless prompts have no over-refusal, and imitation has no rollouts at all."""
    rows = [row | {"rollout/over_refusal": None, "rollout/asr": None} for row in history(**LEARNS)]
    assert names(rows) == []
    assert names([{"step": i, "loss/policy_avg": 1.0} for i in range(20)]) == []


def test_signatures_are_told_once_and_kept_with_each_step(tiny_folder, material, tmp_path, vowels):
    """A random model babbles, so a real run must say so by name; resumed, it does not say it again."""
    said = []

    class Listening(Doing):
        def say(self, text):
            said.append(text)

    align(config_of(tiny_folder, material, steps=4), out=tmp_path / "run", progress=Listening(0, None))
    raised = [row["signatures"] for row in rows_of(tmp_path / "run")]
    assert raised[:2] == [[], []]
    assert "incoherence" in raised[2]
    assert sum(": incoherence: " in line for line in said) == 1
