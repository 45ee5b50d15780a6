"""What a training step asks: prompts, their images and their exits, drawn from nothing but the seed and the step.

A resumed run and every process of a distributed one draw the same.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import NamedTuple

from ..data import images
from ..data.config import SelectionConfig
from ..data.selection import load_samples, photographs_of
from ..engines.prefix import ExitRequest
from ..errors import UserError
from ..model.exit_names import parse_exits
from ..run.exit import Exit
from ..run.records import Sample
from .config import VQA_QUESTIONS, AlignConfig

PROMPTS_PER_IMAGE = 8  # in a step: prompts of one image share the computing of its tokens


class Pools(NamedTuple):
    harmful: list[Sample]
    benign: list[Sample]
    vqa: list[Sample]
    pictures: list[str]
    """Names of the images that prompts without their own are put to; without any, those prompts stay text only."""
    skipped: Sequence[str] = ()
    roots: Mapping[str, Path] = {}
    """Folders of the images, for `load_image`."""
    sources: Sequence[dict[str, object]] = ()
    validation: Sequence[Sample] = ()
    """Harmful and harmless prompts that no batch asks (--validation)."""


class Exits(NamedTuple):
    trained: tuple[Exit, ...]
    held_out: tuple[Exit, ...]
    default: Exit


def load_pools(config: AlignConfig) -> Pools:
    """The samples and image names of a config; what is built in comes from the training split.

    Raises:
        UserError: a file, folder or set cannot be read, or holds nothing usable.
    """
    found = load_samples(config.inputs, SelectionConfig(vqa=VQA_QUESTIONS), config.seed, "train")
    pictures, _ = photographs_of(config.inputs.images, "train")
    harmful, benign, questions = (
        [s for s in found.samples if s.kind == kind and share]  # what no batch asks needs no image either
        for kind, share in zip(("harmful", "benign", "vqa"), config.mix, strict=True)
    )
    for kind, pool, share in zip(("harmful", "benign", "vqa"), (harmful, benign, questions), config.mix, strict=True):
        if share and not pool:
            reason = f"; first skipped: {found.skipped[0]}" if found.skipped else ""
            raise UserError(f"no {kind} sample can be used, and --mix gives them {share:g} of a batch{reason}")
    validation = [*_keep(harmful, config.validation), *_keep(benign, config.validation)]
    return Pools(harmful, benign, questions, pictures, found.skipped, found.roots, found.sources, validation)


def askable(pools: Pools, control_token: Callable[[str], str]) -> Pools:
    """Without the samples whose prompt holds a control token of the model, which could forge a turn or an image.

    Args:
        control_token: the first one in a prompt, "" for none.

    Raises:
        UserError: none of a kind is left.
    """
    kinds = ("harmful", "benign", "vqa", "validation")
    found = {kind: [(s, control_token(s.prompt)) for s in getattr(pools, kind)] for kind in kinds}
    left = {kind: [sample for sample, token in pairs if not token] for kind, pairs in found.items()}
    said = [f"{s.id}: its prompt has the control token {t!r}" for pairs in found.values() for s, t in pairs if t]
    for kind, pairs in found.items():
        if pairs and not left[kind]:
            raise UserError(f"no {kind} sample can be used: {said[0]}, and all others have one too")
    skipped = [*pools.skipped, *said]
    return Pools(left["harmful"], left["benign"], left["vqa"], pools.pictures, skipped, pools.roots, pools.sources,
                 left["validation"])  # fmt: skip


def _keep(pool: list[Sample], n: int) -> list[Sample]:
    """Takes `n` prompts out of a pool, the same ones whatever the seed: runs that differ in it are compared.

    Returns one sample of each; none of that prompt is left, about whatever image.
    """
    by_prompt = {sample.prompt: sample for sample in reversed(pool)}  # the first of each
    prompts = list(dict.fromkeys(sample.prompt for sample in pool))
    if n >= len(prompts) > 0:
        raise UserError(
            f"--validation {n} leaves none of {len(prompts)} {pool[0].kind} prompts to train on; give fewer"
        )
    kept = {prompts[i] for i in random.Random("validation").sample(range(len(prompts)), n)} if pool else set()
    pool[:] = [sample for sample in pool if sample.prompt not in kept]
    return [by_prompt[prompt] for prompt in prompts if prompt in kept]


def choose_exits(config: AlignConfig, n_blocks: int, default: Exit | int) -> Exits:
    """Exits trained and held out.

    Raises:
        UserError: an exit is not there, or none is left to train at.
    """
    held = parse_exits(config.hold_out, n_blocks, default, "--hold-out") if config.hold_out else ()
    trained = tuple(e for e in parse_exits(config.exits, n_blocks, default) if e not in held)
    if not trained:
        raise UserError(f"--hold-out {config.hold_out} leaves no exit of --exits {config.exits} to train at")
    if default in held and any(s and a for s, a in zip(config.mix[1:], config.anchor, strict=True)):
        raise UserError(
            f"--hold-out {config.hold_out} holds out the default exit {default}, at which --anchor trains; "
            "give --anchor 0 0, or leave that exit in"
        )
    return Exits(trained, held, Exit.of(default))


def draw(config: AlignConfig, pools: Pools, exits: Exits, step: int, weights: dict[Exit, float]) -> list[ExitRequest]:
    """The requests of a step: `batch_size` of them, a sample's id ending in its place in the batch.

    Args:
        weights: of the trained exits, under --schedule worst.
    """
    rng = random.Random(f"{config.seed}/batch/{step}")
    counts = per_step(config, exits)
    copies = _copies(config)
    chosen = [
        sample
        for pool, count in zip((pools.harmful, pools.benign, pools.vqa), counts, strict=True)
        for sample in _turn(pool, count, step, config.seed)
    ]
    pictures = rng.sample(pools.pictures, min(len(pools.pictures), -(-len(chosen) // PROMPTS_PER_IMAGE)))
    requests: list[ExitRequest] = []
    for sample in chosen:
        image = rng.choice(pictures) if sample.image in pools.pictures else sample.image
        for exit in _exits_for(sample, config, exits, weights, rng):
            for _ in range(copies):
                requests.append(ExitRequest(replace(sample, id=f"{sample.id}#{len(requests)}", image=image), exit))
    return requests


def per_step(config: AlignConfig, exits: Exits) -> tuple[int, int, int]:
    """How many prompts of each kind a step asks, each `_copies` times at an exit or at every one.

    Raises:
        UserError: the batch cannot be shared so, or a kind with a share would never be asked.
    """
    copies, times = _copies(config), len(exits.trained) if config.schedule == "each" else 1
    n = config.batch_size // copies // times
    if n < 1 or n * copies * times != config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be shared by {times} exits and groups of {copies}; "
            f"give a multiple of {times * copies}"
        )
    counts = _counts(n, config.mix)
    if any(share and not count for share, count in zip(config.mix, counts, strict=True)):
        raise UserError(
            f"--batch-size {config.batch_size} asks {n} prompts a step, of which --mix {config.mix} gives {counts}; "
            "give a larger batch, or no share to a kind that is not to be asked"
        )
    return counts


def _copies(config: AlignConfig) -> int:
    """Answers of a step to one prompt at one exit."""
    return config.group_size if config.method == "grpo" else 1


def _counts(n: int, mix: Sequence[float]) -> tuple[int, int, int]:
    """How many of each kind; rounding favours harmful prompts, then VQA, and never a kind without a share."""
    benign = int(n * mix[1])
    questions = min(n - benign, round(n * mix[2]))
    rest = n - benign - questions
    if mix[0]:
        return rest, benign, questions
    return (0, benign, questions + rest) if mix[2] else (0, benign + rest, questions)


def _turn(pool: list[Sample], count: int, step: int, seed: int) -> list[Sample]:
    """The next `count` samples of a pool that is shuffled anew whenever it has been gone through."""
    picked = []
    for place in range(step * count, (step + 1) * count):
        lap, index = divmod(place, len(pool))
        order = list(range(len(pool)))
        random.Random(f"{seed}/lap/{lap}/{len(pool)}").shuffle(order)
        picked.append(pool[order[index]])
    return picked


def _exits_for(
    sample: Sample, config: AlignConfig, exits: Exits, weights: dict[Exit, float], rng: random.Random
) -> list[Exit]:
    anchored = {"harmful": 0.0, "benign": config.anchor[0], "vqa": config.anchor[1]}[sample.kind]
    if rng.random() < anchored:
        return [exits.default] * (len(exits.trained) if config.schedule == "each" else 1)
    if config.schedule == "each":
        return list(exits.trained)
    if config.schedule == "worst":
        return rng.choices(exits.trained, [weights[e] for e in exits.trained])
    return [rng.choice(exits.trained)]


def probe(config: AlignConfig, pools: Pools, exits: Exits, n: int) -> list[ExitRequest]:
    """Fixed harmful requests at the trained exits, for measuring the return before and after each update."""
    rng = random.Random(f"{config.seed}/probe")
    return [
        ExitRequest(
            replace(
                s, id=f"{s.id}#probe{i}", image=rng.choice(pools.pictures) if s.image in pools.pictures else s.image
            ),
            exits.trained[i % len(exits.trained)],
        )
        for i, s in enumerate(_turn(pools.harmful, n, 0, config.seed + 1))
    ]


def audited(config: AlignConfig, pools: Pools, exits: Exits) -> list[ExitRequest]:
    """What a small audit asks, at each trained exit: the prompts of --validation, or some harmful training prompts."""
    rng = random.Random(f"{config.seed}/audit")
    kept = [
        replace(s, image=rng.choice(pools.pictures)) if s.image in pools.pictures else s for s in pools.validation
    ] or [r.sample for r in probe(config, pools, exits, config.eval_prompts)]
    return [ExitRequest(sample, exit) for exit in exits.trained for sample in kept]


def image_loaders(names: Sequence[str], roots: Mapping[str, Path]) -> dict:
    """What loads each image, by name."""
    return {name: (lambda name=name: images.load_image(name, roots)) for name in names}


def next_weights(weights: dict[Exit, float], asr: dict[Exit, float]) -> dict[Exit, float]:
    """Multiplicative weights of the minimax game against the exits: w <- w * exp(asr), normalised.

    Each exit keeps a tenth of an even share, so that none is forgotten (Freund and Schapire, 1999, with mixing).
    """
    raw = {exit: weight * exp(asr[exit]) for exit, weight in weights.items()}
    total = sum(raw.values())
    return {exit: 0.9 * value / total + 0.1 / len(raw) for exit, value in raw.items()}
