"""Draws the requests of a training step: prompts, their images and their exits.

They depend on the seed and the step alone, so a resumed run and every process of a distributed one draw the same.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import exp
from pathlib import Path
from typing import NamedTuple

from PIL import Image

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
    """Samples that batches are drawn from, by kind."""

    harmful: list[Sample]
    benign: list[Sample]
    vqa: list[Sample]
    pictures: list[str]
    """Names of the images that go with prompts that have none; without any, those prompts stay text only."""
    skipped: Sequence[str] = ()
    roots: Mapping[str, Path] = {}
    """Folders of the images, for `load_image`."""
    sources: Sequence[Mapping[str, object]] = ()
    validation: Sequence[Sample] = ()
    """Harmful and harmless prompts that no batch contains (--validation)."""


class Exits(NamedTuple):
    """The exits of an alignment by their part in it."""

    trained: tuple[Exit, ...]
    held_out: tuple[Exit, ...]
    default: Exit


def load_pools(config: AlignConfig) -> Pools:
    """The samples and image names of a config; built-in ones are from the training split.

    Raises:
        UserError: a file, folder or set cannot be read, or holds nothing usable.
    """
    found = load_samples(config.inputs, SelectionConfig(vqa=VQA_QUESTIONS), config.seed, "train")
    pictures, _ = photographs_of(config.inputs.images, "train")
    harmful, benign, questions = (
        [s for s in found.samples if s.kind == kind and share]  # a kind without a share needs no image either
        for kind, share in zip(("harmful", "benign", "vqa"), config.mix, strict=True)
    )
    for kind, pool, share in zip(("harmful", "benign", "vqa"), (harmful, benign, questions), config.mix, strict=True):
        if share and not pool:
            reason = f"; first skipped: {found.skipped[0]}" if found.skipped else ""
            raise UserError(f"no {kind} sample can be used, and --mix gives them {share:g} of a batch{reason}")
    validation = [*_keep(harmful, config.validation), *_keep(benign, config.validation)]
    return Pools(harmful, benign, questions, pictures, found.skipped, found.roots, found.sources, validation)


def askable(pools: Pools, control_token: Callable[[str], str]) -> Pools:
    """The pools without samples whose prompt has a control token of the model, which could forge a turn or an image.

    Args:
        control_token: finds the first control token in a prompt; "" for none.

    Raises:
        UserError: no sample of a kind is left.
    """
    kinds = ("harmful", "benign", "vqa", "validation")
    found = {kind: [(s, control_token(s.prompt)) for s in getattr(pools, kind)] for kind in kinds}
    left = {kind: [sample for sample, token in pairs if not token] for kind, pairs in found.items()}
    reasons = [f"{s.id}: its prompt has the control token {t!r}" for pairs in found.values() for s, t in pairs if t]
    for kind, pairs in found.items():
        if pairs and not left[kind]:
            raise UserError(f"no {kind} sample can be used: {reasons[0]}, and every other sample has one as well")
    skipped = [*pools.skipped, *reasons]
    return Pools(left["harmful"], left["benign"], left["vqa"], pools.pictures, skipped, pools.roots, pools.sources,
                 left["validation"])  # fmt: skip


def _keep(pool: list[Sample], n: int) -> list[Sample]:
    """Removes `n` prompts from a pool, with all their images; returns one sample of each.

    They are the same for every seed, because runs with different seeds are compared on them.
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
        UserError: an exit does not exist, or none is left to train at.
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
    """Prompts of each kind (harmful, harmless, VQA) in a step, each used `_copies` times at one exit or at all.

    Raises:
        UserError: the batch size does not fit, or a kind with a share would get no prompt.
    """
    copies, times = _copies(config), len(exits.trained) if config.schedule == "each" else 1
    n = config.batch_size // copies // times
    if n < 1 or n * copies * times != config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be divided among {times} exits and groups of {copies}; "
            f"give a multiple of {times * copies}"
        )
    counts = _counts(n, config.mix)
    if any(share and not count for share, count in zip(config.mix, counts, strict=True)):
        raise UserError(
            f"--batch-size {config.batch_size} has {n} prompts per step, of which --mix {config.mix} gives {counts}; "
            "give a larger batch, or a share of 0 to the kind that gets none"
        )
    return counts


def _copies(config: AlignConfig) -> int:
    """Answers to one prompt at one exit in a step."""
    return config.group_size if config.method == "grpo" else 1


def _counts(n: int, mix: Sequence[float]) -> tuple[int, int, int]:
    """`n` divided by the shares; the rest goes to harmful prompts, then to VQA, never to a kind without a share."""
    benign = int(n * mix[1])
    questions = min(n - benign, round(n * mix[2]))
    rest = n - benign - questions
    if mix[0]:
        return rest, benign, questions
    return (0, benign, questions + rest) if mix[2] else (0, benign + rest, questions)


def _turn(pool: list[Sample], count: int, step: int, seed: int) -> list[Sample]:
    """The next `count` samples of a pool that is shuffled anew whenever all of it was used."""
    places = (divmod(place, len(pool)) for place in range(step * count, (step + 1) * count))
    return [pool[_order(seed, lap, len(pool))[index]] for lap, index in places]


@lru_cache(maxsize=8)
def _order(seed: int, lap: int, n: int) -> Sequence[int]:
    """The order of a pool of `n` samples in its lap number `lap`; one shuffle serves all steps of the lap."""
    order = list(range(n))
    random.Random(f"{seed}/lap/{lap}/{n}").shuffle(order)
    return order


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
    """Requests of a small audit at each trained exit: the prompts of --validation, or some harmful training prompts."""
    rng = random.Random(f"{config.seed}/audit")
    kept = [
        replace(s, image=rng.choice(pools.pictures)) if s.image in pools.pictures else s for s in pools.validation
    ] or [r.sample for r in probe(config, pools, exits, config.eval_prompts)]
    return [ExitRequest(sample, exit) for exit in exits.trained for sample in kept]


def image_loaders(names: Sequence[str], roots: Mapping[str, Path]) -> dict[str, Callable[[], Image.Image]]:
    """{name of an image: function that loads it}."""
    return {name: partial(images.load_image, name, roots) for name in names}


def next_weights(weights: dict[Exit, float], asr: dict[Exit, float]) -> dict[Exit, float]:
    """Multiplicative weights of the minimax game against the exits: w <- w * exp(asr), normalised.

    Each exit keeps a tenth of an even share, so that all are drawn (Freund and Schapire, 1999, with mixing).
    """
    raw = {exit: weight * exp(asr[exit]) for exit, weight in weights.items()}
    total = sum(raw.values())
    return {exit: 0.9 * value / total + 0.1 / len(raw) for exit, value in raw.items()}
