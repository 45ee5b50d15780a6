"""Trains a reward model on preference pairs, and measures it on pairs that were held out.

    pairs -> split by prompt -> backbone + LoRA + linear head -> Bradley-Terry steps -> shift and scale -> metrics, card

The run folder is the reward model: reward.json, head.safetensors, and adapter_model.safetensors (LoRA) or backbone/
(full). Besides: config.json, plan.json, env.json, metrics.jsonl (a line a step), metrics.json, README.md (the card) and
checkpoint.safetensors. Killed and started again it ends with the same bytes: there is no dropout (the backbone is in
evaluation mode), the order of the pairs hangs on the seed alone, and a checkpoint holds weights and AdamW's moments.
"""

import hashlib
import json
import math
import os
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.preferences import Preference, load_preferences
from ..errors import UserError
from ..measure.stats import wilson
from ..model.features import writing
from ..model.quiet import quiet
from ..model.vlm import FAMILIES, TESTBEDS
from ..rewards.config import RewardConfig
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.provenance import environment, fingerprint
from .models import (
    HeadReward,
    PublishedReward,
    Reader,
    Recipe,
    backbone_of,
    batches,
    bradley_terry_loss,
    deviation,
    last_hidden,
    load_text_backbone,
    loading_errors,
    reader_of_text,
    reader_of_vlm,
)

LEARNING_RATES = {"lora": 1e-3, "full": 1e-5}
CALIBRATION_BINS = 10
ALL = "all"


# ---------------------------------------------------------------------------------------------- pairs


class Split(NamedTuple):
    train: list[Preference]
    held_out: list[Preference]


def split_by_prompt(pairs: Sequence[Preference], share: float, seed: int) -> Split:
    """About `share` of the prompts, at least one, with all their pairs are held out; both keep the order given.

    Raises:
        UserError: there is only one prompt.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise UserError("the pairs have one prompt only, so none can be held out; give more, or --held-out FILE")
    n = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    chosen = set(random.Random(seed).sample(prompts, n))
    return Split([p for p in pairs if p.prompt not in chosen], [p for p in pairs if p.prompt in chosen])


def load_split(config: RewardConfig, progress: Progress) -> Split:
    """The pairs of a config. Raises UserError where a prompt of the held-out files is trained on too."""
    pairs = _load(config.pairs, config.limit, progress)
    if not config.held_out:
        return split_by_prompt(pairs, config.held_out_share, config.seed)
    held_out = _load(config.held_out, config.limit, progress)
    both = sorted({p.prompt for p in pairs} & {p.prompt for p in held_out})
    if both:
        raise UserError(f"{len(both)} prompts are in --pairs and --held-out both, first {both[0][:60]!r}; part them")
    return Split(pairs, held_out)


def _load(sources: Sequence[str], limit: int | None, progress: Progress) -> list[Preference]:
    pairs: list[Preference] = []
    for source in sources:
        loaded = load_preferences(source, limit)
        for line in loaded.skipped:
            progress.say(f"skipped {line}")
        pairs += loaded.pairs
    return pairs


# ---------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Trainee:
    """A backbone with what is trained of it.

    Attributes:
        model: the root: a PeftModel (lora), or the VLM or text model itself (full).
        weights: every trained tensor by name, the head among them.
    """

    model: Any
    backbone: Any
    head: torch.nn.Parameter
    reader: Reader
    recipe: Recipe
    weights: dict[str, torch.nn.Parameter]

    @property
    def device(self) -> torch.device:
        return self.head.device


class Base(NamedTuple):
    model: Any
    reader: Reader
    kind: str  # vlm or text
    device: torch.device


def load_base(config: RewardConfig) -> Base:
    """The backbone in float32, frozen."""
    from ..model.vlm import load_vlm

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.backbone in TESTBEDS or _is_vlm(config.backbone):
        vlm = load_vlm(config.backbone, dtype="float32", device=device)
        return Base(vlm.model, reader_of_vlm(vlm, config.max_length), "vlm", vlm.device)
    model, tokenizer = load_text_backbone(config.backbone)
    model = model.to(device).requires_grad_(False)
    return Base(model, reader_of_text(tokenizer, config.max_length), "text", model.device)


def _is_vlm(source: str) -> bool:
    from transformers import AutoConfig

    with quiet(), loading_errors(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False).model_type in FAMILIES


def make_trainee(base: Base, config: RewardConfig) -> Trainee:
    """A fresh adapter (or all weights) and a head of zeros: before the first step every score is 0."""
    torch.manual_seed(config.seed)
    model, backbone = base.model, backbone_of(base.model)
    if config.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        targets = FAMILIES[model.config.model_type].lora_targets if base.kind == "vlm" else "all-linear"
        lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=targets)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, lora)
        model.peft_config["default"].base_model_name_or_path = config.backbone
    else:
        backbone.requires_grad_(True)
    model.eval()
    head = torch.nn.Parameter(torch.zeros(backbone.config.hidden_size, device=base.device))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = "" if config.tuning == "full" else config.backbone
    recipe = Recipe(whole, base.kind, base.reader.chat_template, base.reader.parts, config.max_length)
    return Trainee(model, backbone, head, base.reader, recipe, {**weights, "head": head})


# ---------------------------------------------------------------------------------------------- training

Row = tuple[list[int], list[int]]
"""Token ids of the prompt with the chosen answer, and with the rejected one."""


def train_reward(config: RewardConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Trains (or goes on training) a reward model in the run folder `out`; returns what metrics.json holds.

    Raises:
        UserError: bad input, `out` belongs to another config or other pairs, or the loss is no number any more.
    """
    config.check()
    progress = progress or Silent()
    split = load_split(config, progress)
    with directory.open_run(out, json.loads(json.dumps(asdict(config)))):
        base = load_base(config)
        _write_plan(out, config, split, base)
        trainee = make_trainee(base, config)
        rows = [(trainee.reader.ids(p.prompt, p.chosen), trainee.reader.ids(p.prompt, p.rejected)) for p in split.train]
        directory.write_json(out / "env.json", environment(trainee))
        fit(trainee, rows, config, out, progress)
        return finish(trainee, config, split, out, progress)


def fit(trainee: Trainee, rows: list[Row], config: RewardConfig, out: Path, progress: Progress) -> None:
    """All optimizer steps from the last checkpoint on; one line of metrics.jsonl each."""
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
    """Indices of each step's pairs: every epoch goes through all of them in an order of its own."""
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


def gradients(trainee: Trainee, rows: list[Row], micro_tokens: int) -> torch.Tensor:
    """Adds the gradient of the mean Bradley-Terry loss over the rows; returns margins (B,), chosen minus rejected."""
    margins = torch.zeros(len(rows))
    for batch in batches([2 * max(map(len, row)) for row in rows], micro_tokens):
        texts = [rows[i][0] for i in batch] + [rows[i][1] for i in batch]
        scores = last_hidden(trainee.backbone, texts, trainee.reader.pad_id) @ trainee.head
        chosen, rejected = scores.chunk(2)
        (bradley_terry_loss(chosen, rejected) * (len(batch) / len(rows))).backward()
        margins[batch] = (chosen - rejected).detach().cpu()
    return margins


def _write_plan(out: Path, config: RewardConfig, split: Split, base: Base) -> None:
    """plan.json, or the check that this is the run it was: same pairs, same backbone, as many threads."""
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


def save_checkpoint(path: Path, step: int, weights: dict[str, torch.nn.Parameter], optimizer: Any) -> None:
    """Weights and AdamW's moments after `step` steps, whole or not at all."""
    tensors = {}
    for name, weight in weights.items():
        state = optimizer.state[weight]
        tensors[f"weight/{name}"] = weight.data.contiguous()
        for key, moment in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            # layers that run only where there is an image (mllama) have no moments
            tensors[f"{key}/{name}"] = state[moment].contiguous() if moment in state else torch.zeros_like(weight.data)
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        save_file(tensors, scratch, metadata={"step": str(step)})
    with open(scratch, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(scratch, path)


def load_checkpoint(path: Path, weights: dict[str, torch.nn.Parameter], optimizer: Any) -> int:
    """Puts weights and moments back; returns the steps done, 0 where there is no checkpoint.

    Raises:
        UserError: the checkpoint is broken.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            for name, weight in weights.items():
                weight.data.copy_(file.get_tensor(f"weight/{name}"))
                moments = (file.get_tensor(f"{key}/{name}").to(weight.device) for key in ("first", "second"))
                optimizer.state[weight] = dict(
                    zip(("step", "exp_avg", "exp_avg_sq"), (torch.tensor(float(step)), *moments), strict=True)
                )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is broken ({error}); delete it to begin again") from None
    return step


# ---------------------------------------------------------------------------------------------- measuring


def finish(trainee: Trainee, config: RewardConfig, split: Split, out: Path, progress: Progress) -> dict[str, Any]:
    """Shift and scale from the held-out answers, the reward model's files, metrics.json and the card."""
    progress.say(f"measuring on {len(split.held_out)} held-out pairs")
    head = trainee.head.detach()
    raw = HeadReward(str(out), trainee.backbone, head, trainee.reader, trainee.recipe)
    margins, logits = margins_of(raw, split.held_out)
    shift, scale = deviation(logits)
    recipe = Recipe(**{**trainee.recipe.to_json(), "shift": shift, "scale": scale})
    with writing(out), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the backbone's config by name
        save_file({"weight": head.cpu().contiguous()}, out / "head.safetensors")
        if config.tuning == "lora":
            trainee.model.save_pretrained(out)  # its README.md is replaced below
        else:
            trainee.backbone.save_pretrained(out / "backbone")
            trainee.reader.tokenizer.save_pretrained(out / "backbone")
    directory.write_json(out / "reward.json", recipe.to_json())
    metrics = measure(margins, [pair.category for pair in split.held_out])
    directory.write_json(out / "metrics.json", metrics)
    counts = Counter(pair.category for pair in split.train)
    directory.write_atomic(out / "README.md", card(config, metrics, counts))
    return metrics


def evaluate(reward: HeadReward | PublishedReward, pairs: Sequence[Preference]) -> dict[str, Any]:
    """What `measure` finds for a reward model on these pairs."""
    return measure(margins_of(reward, pairs)[0], [pair.category for pair in pairs])


def margins_of(reward: HeadReward | PublishedReward, pairs: Sequence[Preference]) -> tuple[np.ndarray, torch.Tensor]:
    """(N,) log odds that the chosen answer is preferred, and the (2N,) scores before normalisation."""
    prompts = [pair.prompt for pair in pairs]
    logits = reward.logits(prompts * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    chosen, rejected = logits.double().chunk(2)
    return (chosen - rejected).numpy(), logits


def measure(margins: np.ndarray, categories: Sequence[str]) -> dict[str, Any]:
    """Accuracy with Wilson interval, mean margin, calibration error, Brier score: all pairs, then by category."""
    groups: dict[str, np.ndarray] = {ALL: np.ones(len(margins), dtype=bool)}
    for name in sorted(set(categories) - {""}):
        groups[name] = np.array([category == name for category in categories])
    return {name: _measures(margins[rows]) for name, rows in groups.items()}


def _measures(margins: np.ndarray) -> dict[str, Any]:
    chances = 1 / (1 + np.exp(-margins))  # that the chosen answer is preferred (Bradley and Terry)
    return {
        "n": len(margins),
        "accuracy": wilson(int((margins > 0).sum()), len(margins))._asdict(),
        "margin": float(margins.mean()),
        "calibration_error": calibration_error(chances),
        "brier": float(((1 - chances) ** 2).mean()),
    }


def calibration_error(chances: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, eq. 3) of a model that names the better answer.

    Its confidence is max(p, 1 - p), so the bins cut [0.5, 1] in equal parts; it is right where p > 0.5.

    Args:
        chances: (N,) p that the chosen answer is the better one; N > 0.
    """
    confidence, right = np.maximum(chances, 1 - chances), chances > 0.5
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(right[bin_of == b].mean() - confidence[bin_of == b].mean()) * (bin_of == b).sum() for b in set(bin_of)]
    return float(sum(gaps) / len(chances))


def table(metrics: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| category | pairs | accuracy | mean margin | calibration error | Brier |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in metrics.items():
        a = row["accuracy"]
        share = f"{100 * a['value']:.1f} % ({100 * a['low']:.0f}-{100 * a['high']:.0f})"
        rest = f"{row['margin']:.2f} | {row['calibration_error']:.3f} | {row['brier']:.3f}"
        lines.append(f"| {name} | {row['n']} | {share} | {rest} |")
    return "\n".join(lines)


def card(config: RewardConfig, metrics: dict[str, Any], counts: Mapping[str, int]) -> str:
    """README.md of a reward model, every figure measured."""
    how = f"LoRA of rank {config.rank}" if config.tuning == "lora" else "all weights"
    told = ", ".join(f"{n} {name or 'of no category'}" for name, n in sorted(counts.items()))
    return f"""# Reward model on {config.backbone}

A linear head on the last token's hidden state, {how}, Bradley-Terry loss on pairs of answers. Higher is better; scores
over the held-out answers have mean 0 and deviation 1. Load it with `exitwise.rewards.load_reward`.

Trained on {sum(counts.values())} pairs ({told}), {config.epochs} epoch(s), seed {config.seed}, at most
{config.max_length} tokens of a dialogue.

## Held-out pairs

No prompt of these was trained on. Accuracy: the chosen answer scores higher, with Wilson's 95 % interval. Margin: log
odds. Calibration error: of sigmoid(margin), ten bins. Brier: mean of (1 - sigmoid(margin))².

{table(metrics)}

## Not good for

Answers unlike those in its pairs: a policy that is trained against a reward model finds what the model does not know.
Read the answers, not only the scores.
"""
