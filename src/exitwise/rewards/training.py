"""Trains a reward model on preference pairs, and measures it on held-out pairs.

    pairs -> split by prompt -> backbone + LoRA + linear head -> Bradley-Terry steps -> shift and scale -> metrics, card

The run folder is the reward model: reward.json, head.safetensors, and adapter_model.safetensors (LoRA) or backbone/
(full). Besides: config.json, plan.json, env.json, metrics.jsonl (a line a step), metrics.json, README.md (the card) and
checkpoint.safetensors. A run that was killed and started again ends with the same bytes: there is no dropout (the
backbone is in evaluation mode), the order of the pairs depends on the seed alone, and a checkpoint holds weights and
AdamW's moments.

Shapes: B pairs.
"""

import hashlib
import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..data.options import make_config
from ..errors import UserError
from ..model.features import writing
from ..model.quiet import quiet
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.provenance import environment, fingerprint
from .card import card
from .checkpoint import load_checkpoint, save_checkpoint
from .config import RewardConfig
from .evaluation import PairMeasures, margins_of, mean_and_spread, measure, to_json
from .models import HeadReward, last_hidden
from .pairs import PairSplit, load_split
from .protocol import micro_batches
from .trainee import Backbone, Trainee, load_backbone, make_trainee

LEARNING_RATES = {"lora": 1e-3, "full": 1e-5}

TokenPair = tuple[list[int], list[int]]
"""Token ids of the prompt with the chosen answer, and with the rejected one."""


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log σ(chosen - rejected) over (B,) scores; Bradley and Terry 1952, Ouyang et al. 2022 eq. 1."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def train_reward(
    backbone: str | PathLike[str] | RewardConfig,
    out: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: object,
) -> dict[str, PairMeasures]:
    """Trains a reward model, or resumes a stopped training; returns its figures on the held-out pairs.

        train_reward("testbed", pairs="pairs.jsonl", out="runs/reward")

    Args:
        backbone: model to train on: "testbed", a folder or a hub id; or a whole `RewardConfig`.
        out: the run directory; without it, runs/reward-<name of the backbone>.
        options: the other options of `RewardConfig` as keywords.

    Raises:
        UserError: bad input, `out` belongs to another config or other pairs, or the loss is not finite.
    """
    if not isinstance(backbone, RewardConfig):
        config = make_config(RewardConfig, {"backbone": backbone, **options})
    elif options:
        raise UserError(f"train_reward got a RewardConfig and options ({', '.join(options)}); set them in the config")
    else:
        config = backbone
    config.check()
    out = Path(out) if out is not None else Path("runs", f"reward-{Path(config.backbone).resolve().name}")
    progress = progress or Silent()
    split = load_split(config, progress)
    with directory.open_run(out, json.loads(json.dumps(asdict(config)))):
        base = load_backbone(config)
        _write_plan(out, config, split, base)
        trainee = make_trainee(base, config)
        ids = trainee.dialogues.ids
        rows = [(ids(p.prompt, p.chosen), ids(p.prompt, p.rejected)) for p in split.train]
        directory.write_json(out / "env.json", environment(trainee))
        fit(trainee, rows, config, out, progress)
        return finish(trainee, config, split, out, progress)


def fit(trainee: Trainee, rows: Sequence[TokenPair], config: RewardConfig, out: Path, progress: Progress) -> None:
    """All optimizer steps from the last checkpoint on; writes one line of metrics.jsonl each."""
    order = batch_order(len(rows), config.batch_size, config.epochs, config.seed)
    optimizer = torch.optim.AdamW(trainee.weights.values(), lr=1.0, weight_decay=config.weight_decay)
    done = load_checkpoint(out / "checkpoint.safetensors", trainee.weights, optimizer)
    log = out / "metrics.jsonl"
    directory.truncate_to(log, done)
    peak = config.lr or LEARNING_RATES[config.tuning]
    progress.start(len(order), "steps")
    progress.advance(done)
    for step in range(done, len(order)):
        optimizer.param_groups[0]["lr"] = lr_at(step, len(order), peak, config.warmup)
        margins = gradients(trainee, [rows[i] for i in order[step]], config.micro_tokens)
        for weight in trainee.weights.values():
            if weight.grad is None:  # in layers of cross-attention, which a text alone does not reach
                weight.grad = torch.zeros_like(weight)
        norm = torch.nn.utils.clip_grad_norm_(trainee.weights.values(), config.max_grad_norm)
        loss = float(bradley_terry_loss(margins, torch.zeros_like(margins)))
        if not math.isfinite(loss + float(norm)):
            raise UserError(
                f"the loss is {loss} and the gradient {float(norm)} at step {step}; the last checkpoint is kept; start "
                "again in another folder with a smaller --lr"
            )
        optimizer.step()
        optimizer.zero_grad()
        line = {
            "step": step,
            "loss": loss,
            "accuracy": float((margins > 0).float().mean()),
            "margin": float(margins.mean()),
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
        }
        with open(log, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == len(order):
            save_checkpoint(out / "checkpoint.safetensors", step + 1, trainee.weights, optimizer)
        progress.advance(1)


def batch_order(n: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of each step's pairs: every epoch has all of them, each in an order of its own."""
    rng, steps = random.Random(seed), []
    for _ in range(epochs):
        order = rng.sample(range(n), n)
        steps += [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return steps


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of step 0 … steps - 1: linear to the peak, then a cosine that would be 0 at `steps`."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def gradients(trainee: Trainee, rows: Sequence[TokenPair], micro_tokens: int) -> torch.Tensor:
    """Adds the gradient of the mean Bradley-Terry loss over the rows; returns margins (B,), chosen minus rejected."""
    margins = torch.zeros(len(rows))
    for batch in micro_batches([2 * max(map(len, row)) for row in rows], micro_tokens):
        texts = [rows[i][0] for i in batch] + [rows[i][1] for i in batch]
        scores = last_hidden(trainee.backbone, texts, trainee.dialogues.pad_id) @ trainee.head
        chosen, rejected = scores.chunk(2)
        (bradley_terry_loss(chosen, rejected) * (len(batch) / len(rows))).backward()
        margins[batch] = (chosen - rejected).detach().cpu()
    return margins


def finish(
    trainee: Trainee, config: RewardConfig, split: PairSplit, out: Path, progress: Progress
) -> dict[str, PairMeasures]:
    """Shift and scale from the held-out answers; writes the reward model's files, metrics.json and the card."""
    progress.say(f"measuring on {len(split.held_out)} held-out pairs")
    head = trainee.head.detach()
    raw = HeadReward(str(out), trainee.backbone, head, trainee.dialogues, trainee.recipe)
    margins, logits = margins_of(raw, split.held_out)
    shift, scale = mean_and_spread(logits)
    with writing(out), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the backbone's config by name
        save_file({"weight": head.cpu().contiguous()}, out / "head.safetensors")
        if config.tuning == "lora":
            trainee.model.save_pretrained(str(out))  # its README.md is replaced below
        else:
            trainee.backbone.save_pretrained(out / "backbone")
            trainee.dialogues.tokenizer.save_pretrained(out / "backbone")
    directory.write_json(out / "reward.json", replace(trainee.recipe, shift=shift, scale=scale).to_json())
    measures = measure(margins, [pair.category for pair in split.held_out])
    directory.write_json(out / "metrics.json", to_json(measures))
    counts = Counter(pair.category for pair in split.train)
    directory.write_atomic(out / "README.md", card(config, measures, counts))
    return measures


def _write_plan(out: Path, config: RewardConfig, split: PairSplit, base: Backbone) -> None:
    """Writes plan.json, or on resume checks it: same pairs, same backbone; restores the number of threads."""
    digest = hashlib.sha256("\n".join(p.to_json() for part in split for p in part).encode("utf-8", "surrogatepass"))
    plan = {
        "pairs": len(split.train),
        "held_out": len(split.held_out),
        "steps": config.epochs * math.ceil(len(split.train) / config.batch_size),
        "pairs_sha256": digest.hexdigest(),
        "model_sha256": fingerprint(base),
        "threads": torch.get_num_threads(),
    }
    path = out / "plan.json"
    if path.exists():
        known = directory.read_json(path, *plan)
        changed = [key for key in plan if key != "threads" and plan[key] != known[key]]
        if changed:
            raise UserError(f"{out} was begun with other pairs or another backbone ({', '.join(changed)}); give --out")
        torch.set_num_threads(known["threads"])  # the order of a float32 sum depends on them
    else:
        directory.write_json(path, plan)
