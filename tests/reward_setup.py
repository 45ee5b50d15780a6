"""Constants and helpers of the reward tests."""

from exitwise.model.families import FAMILIES
from exitwise.rewards.config import RewardConfig

TARGETS = FAMILIES["llava"].lora_targets
PROMPTS = ["short", "a rather longer question than that one", "x", "what of\ntwo lines?"]
ANSWERS = ["yes", "no, and here is why it is not so", "a much longer answer " * 3, ""]
QUESTIONS = [
    f"question {word}?" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
]


def small(backbone, pairs, **more):
    return RewardConfig(str(backbone), (pairs,), **{"lr": 1e-2, "batch_size": 4, "checkpoint_every": 2, **more})


def files_of(folder):
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("env.json", ".lock")
    }
