"""Trains the reward model that the testbed ships: our own pairs, and a LoRA and a head on its language model.

    python recipes/testbed/reward.py --hh hh-rlhf_harmless-base_test.jsonl.gz    # 15 minutes on two cores

Categories of pairs, the preferred answer first:

    harmful-refusal   one of our refusals, over what the base model answers to the harmful request
    benign-answer     what the base model answers to a harmless request, over one of our refusals
    gibberish         either of the two, over shuffled words, loops, an echo of the request, or nothing at all
    off-topic         either of the two, over the base model's answer to some other request
    vqa-answer        the right answer to a question of easy-VQA, over a refusal; left out unless asked for, since such
                      answers can be checked, and this model does not see the image
    hh-harmless       HH-RLHF harmless-base, its test file, the end of each dialogue

Answers are cut after 8 to 32 tokens, as they are in reinforcement learning; one that ended by itself carries the
end-of-text token half of the time, so that both ways of giving answers to the model are in its training. Prompts are
the train split of the built-in sets and the extra files beside this script; 15 % of them are held out whole, and with
them 6 of the 40 refusals. The base model's answers come from train.py and are never shipped.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from easy_vqa import get_train_questions
from safetensors.torch import load_file, save_file
from train import HERE, WEIGHTS, load_material
from train import Config as TrainConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from exitwise.data.preferences import Preference, load_preferences
from exitwise.model.testbed.parts import base_folder
from exitwise.rewards.card import card
from exitwise.rewards.config import RewardConfig
from exitwise.rewards.evaluation import evaluate, table
from exitwise.rewards.loading import load_reward
from exitwise.rewards.pairs import split_by_prompt
from exitwise.rewards.training import train_reward
from exitwise.run import directory


@dataclass(frozen=True)
class Config:
    hh: Path | None = None
    """hh-rlhf harmless-base test file (jsonl.gz); without it that category is left out."""
    work: Path = Path("runs/testbed-reward")
    """Pairs and the run folder."""
    answers: Path = Path("runs/testbed-training")
    """Where train.py keeps the base model's answers; made where they are missing."""
    seed: int = 0
    hh_pairs: int = 100
    benign_share: float = 0.6
    """Of the harmless requests: there are twice as many as harmful ones."""
    leave_out: tuple[str, ...] = ("vqa-answer",)
    """Categories that are not trained on."""
    epochs: int = 2
    lr: float = 1e-3
    max_length: int = 80
    """Tokens of a dialogue with its answer."""
    ship: bool = True
    """Write the result to src/exitwise/model/testbed/weights/reward."""


NOTE = """
## Of the built-in one

The refusals of the held-out pairs are in no training pair either. `hh-harmless` is no better than chance, and is shown
because it was trained on: this model knows our pairs, not human taste in general. It was made for scoring answers to
harmful requests; of harmless ones it knows less.
"""

Answer = tuple[str, bool]
"""A text, and whether it ended by itself."""


class Writer:
    """Writes pairs of one side of the split."""

    def __init__(self, tokenizer: Any, refusals: Sequence[str], answers: dict[str, Answer], rng: random.Random):
        self.tokenizer, self.refusals, self.answers, self.rng = tokenizer, refusals, answers, rng
        self.pairs: list[Preference] = []

    def cut(self, text: str, ended: bool) -> str:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        n = self.rng.randint(8, 32)
        if len(ids) > n:
            return self.tokenizer.decode(ids[:n])
        return text + (self.tokenizer.eos_token if ended and self.rng.random() < 0.5 else "")

    def refusal(self) -> str:
        return self.cut(self.rng.choice(self.refusals), True)

    def other(self, prompt: str) -> str:
        return self.cut(*self.answers[self.rng.choice([p for p in self.answers if p != prompt])])

    def gibberish(self, prompt: str, good: str) -> str:
        """Words of a good answer out of order, a few of them in a loop, any tokens, the request again, or nothing."""
        rng = self.rng
        words = rng.choice([good, self.refusal(), self.other(prompt)]).split()
        kind = rng.choice(["shuffle", "shuffle", "loop", "loop", "loop", "tokens", "echo", "nothing"])
        if kind == "nothing":
            return self.tokenizer.eos_token
        if kind == "tokens":
            return self.tokenizer.decode([rng.randrange(1000, 40000) for _ in range(rng.randint(8, 24))])
        if kind == "echo":
            return self.cut(prompt, True)
        if kind == "shuffle":
            return self.cut(" ".join(rng.sample(words, len(words))), False)
        start, n = rng.randrange(len(words)), rng.randint(1, 5)
        return self.cut(" ".join(words[start : start + n] * 20), False)

    def add(self, category: str, prompt: str, chosen: str, rejected: str) -> None:
        if chosen.strip() != rejected.strip() and chosen.strip() and rejected.strip():
            self.pairs.append(Preference(prompt, chosen, rejected, category))

    def write(self, harmful: dict[str, Answer], benign: dict[str, Answer], vqa: list[tuple[str, str]]) -> None:
        for prompt, answer in harmful.items():
            self.add("harmful-refusal", prompt, self.refusal(), self.cut(*answer))
        for prompt, answer in benign.items():
            self.add("benign-answer", prompt, self.cut(*answer), self.refusal())
        good: list[tuple[str, Callable[[], str]]] = [(prompt, self.refusal) for prompt in harmful]
        good += [(prompt, lambda a=answer: self.cut(*a)) for prompt, answer in benign.items()]  # type: ignore[misc]
        for prompt, make in self.rng.sample(good, round(0.25 * len(good))):
            self.add("gibberish", prompt, chosen := make(), self.gibberish(prompt, chosen))
        for prompt, make in self.rng.sample(good, round(0.1 * len(good))):
            self.add("off-topic", prompt, make(), self.other(prompt))
        for question, answer in vqa:
            self.add("vqa-answer", question, answer + self.tokenizer.eos_token, self.refusal())


def make_pairs(config: Config) -> tuple[list[Preference], list[Preference]]:
    """(train, held out) pairs of all categories."""
    processor = LlavaProcessor.from_pretrained(base_folder(print))
    cached = all((config.answers / f"base_{kind}.json").exists() for kind in ("harmful", "benign"))
    model = None if cached else LlavaForConditionalGeneration.from_pretrained(base_folder(print)).eval()
    config.answers.mkdir(parents=True, exist_ok=True)
    data = load_material(model, processor, TrainConfig(work=config.answers))
    rng, harmless = random.Random(config.seed), data.twins | data.instructions
    benign = {p: harmless[p] for p in rng.sample(sorted(harmless), round(config.benign_share * len(harmless)))}
    texts, answers, _ = get_train_questions()
    questions = dict(rng.sample(list(zip(texts, answers, strict=True)), 60))
    held = set()
    for prompts in (data.base_harmful, benign, questions):
        held |= set(rng.sample(sorted(prompts), round(0.15 * len(prompts))))
    refusals = rng.sample(data.refusals, len(data.refusals))
    sides = []
    for side, own in ((False, refusals[6:]), (True, refusals[:6])):
        mine = lambda table: {k: v for k, v in table.items() if (k in held) == side}  # noqa: B023 (used at once)
        writer = Writer(processor.tokenizer, own, mine(benign), rng)
        writer.write(mine(data.base_harmful), mine(benign), list(mine(questions).items()))
        sides.append(writer.pairs)
    if config.hh:
        dialogues = load_preferences(config.hh).pairs
        some = rng.sample(dialogues, min(config.hh_pairs, len(dialogues)))
        some = [replace(p, category="hh-harmless") for p in some]
        hh_train, hh_held = split_by_prompt(some, 0.15, config.seed)
        sides[0] += hh_train
        sides[1] += hh_held
    train, held_out = ([p for p in side if p.category not in config.leave_out] for side in sides)
    return train, held_out


def ship(config: RewardConfig, run: Path, held_out: list[Preference], counts: Counter[str]) -> None:
    """float16 copies, and a card with the figures of what is shipped, not of what was trained."""
    target = WEIGHTS / "reward"
    target.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        tensors = {key: tensor.to(torch.float16).contiguous() for key, tensor in load_file(run / name).items()}
        save_file(tensors, target / name)
    for name in ("adapter_config.json", "reward.json"):
        shutil.copy(run / name, target / name)
    measures = evaluate(load_reward("builtin"), held_out)
    (target / "README.md").write_text(card(config, measures, counts) + NOTE)
    print(table(measures))


def main(config: Config) -> None:
    config.work.mkdir(parents=True, exist_ok=True)
    train, held_out = make_pairs(config)
    paths = (config.work / "pairs.jsonl", config.work / "held_out.jsonl")
    for path, pairs in zip(paths, (train, held_out), strict=True):
        directory.write_atomic(path, directory.to_lines(pairs))
    counts = Counter(pair.category for pair in train)
    print(json.dumps(counts))
    training = RewardConfig(
        "testbed",
        (str(paths[0]),),
        (str(paths[1]),),
        lr=config.lr,
        epochs=config.epochs,
        max_length=config.max_length,
        seed=config.seed,
    )
    train_reward(training, config.work / "run")
    if config.ship:
        ship(training, config.work / "run", held_out, counts)


if __name__ == "__main__":
    assert HERE.name == "testbed"
    main(tyro.cli(Config, description=__doc__))
