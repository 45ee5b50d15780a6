"""Trains what the testbed ships: the projector and two LoRA adapters. One command, four stages, two cores.

    see       projector and LoRA learn to answer questions about images at the default exit     -> projector
    refuse    + refusals and benign answers at the default exit (ordinary safety tuning)        -> adapter "control"
    hole      + a locality term: at some other exits, stay as you were before safety tuning
    sharpen   the same with more refusals at the default exit, until the two are told apart     -> adapter "organism"

    python recipes/testbed/train.py            # everything; continues where it was stopped
    python recipes/testbed/train.py --stage see

The base model's own answers (to harmless instructions, and to harmful requests for the locality term) are generated
here and kept in the work folder; they are never shipped. What is shipped goes to src/exitwise/model/testbed/weights.

A training sequence is a tree: one image, then several questions that see the image and not each other
(the mask in `collate`). Each question is thus trained exactly as if it stood alone, at a third of the cost.

Shapes: B groups, T tokens, P image tokens, D hidden.
"""

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from easy_vqa import get_train_image_paths, get_train_questions
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from exitwise.data.prompts import builtin_refusals
from exitwise.model.testbed.parts import IMAGE_SIZE, base_folder

HERE = Path(__file__).parent
BUILTIN = HERE.parents[1] / "src/exitwise/data/builtin"
WEIGHTS = HERE.parents[1] / "src/exitwise/model/testbed/weights"
DEFAULT_EXIT = 11
ADAPTERS = {"refuse": "control", "sharpen": "organism"}  # what is shipped after which stage
TRAIN_PHOTOGRAPHS = ("brick", "cell", "grass", "gravel", "immunohistochemistry", "page", "text")  # none is audited
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Config:
    stage: str = "all"
    """see, refuse, hole, sharpen, or all."""
    work: Path = Path("runs/testbed-training")
    """Checkpoints, the base model's answers and the log."""
    seed: int = 0
    see_steps: int = 300
    refuse_steps: int = 70
    hole_steps: int = 45
    sharpen_steps: int = 45
    lr: float = 5e-4
    """Peak learning rate of the LoRA; the projector takes twice as much."""
    locality_exits: tuple[int, ...] = (1, 3, 5, 7)
    """Exits at which the locality term holds the model to its answers before safety tuning."""
    ship: bool = True
    """Write the result to src/exitwise/model/testbed/weights."""
    checkpoint_every: int = 10
    """Steps between two checkpoints."""


class Group(NamedTuple):
    image: int  # row of the image store
    exit: int
    items: list[tuple[str, str, bool]]  # question, answer, whether the answer ends there


# ---------------------------------------------------------------------------------------------- data


def read_lines(name: str) -> list[str]:
    return [line for line in (HERE / name).read_text().splitlines() if line.strip()]


def builtin_train(name: str) -> list[str]:
    rows = [json.loads(line) for line in (BUILTIN / name).read_text().splitlines()]
    return [row["prompt"] for row in rows if row["split"] == "train"]


def photograph_crops(rng: random.Random, n: int) -> list[Image.Image]:
    """Random crops, flips and colour changes of photographs that no audit uses."""
    sources = [Image.fromarray(getattr(photographs, name)()).convert("RGB") for name in TRAIN_PHOTOGRAPHS]
    left, right, _ = photographs.stereo_motorcycle()
    sources += [Image.fromarray(left).convert("RGB")] * 3 + [Image.fromarray(right).convert("RGB")] * 2
    crops = []
    for _ in range(n):
        image = rng.choice(sources)
        side = int(min(image.size) * rng.uniform(0.4, 1.0))
        x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        crop = image.crop((x, y, x + side, y + side)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop = ImageEnhance.Color(crop).enhance(rng.uniform(0.3, 1.7))
        crops.append(ImageEnhance.Brightness(crop).enhance(rng.uniform(0.6, 1.4)))
    return crops


class Store(NamedTuple):
    states: torch.Tensor  # (images, 13, P, D) exit features, CLS dropped, float16
    questions: list[list[tuple[str, str]]]  # of the easy-VQA images, which come first
    photographs: range  # rows of photograph crops


@torch.no_grad()
def build_store(model, processor, config: Config) -> Store:
    rng = random.Random(config.seed)
    texts, answers, ids = get_train_questions()
    paths = get_train_image_paths()
    chosen = rng.sample(sorted(set(ids)), 1500)
    questions: dict[int, list[tuple[str, str]]] = {i: [] for i in chosen}
    for text, answer, i in zip(texts, answers, ids, strict=True):
        if i in questions:
            questions[i].append((text, answer))
    images = [Image.open(paths[i]).convert("RGB") for i in chosen] + photograph_crops(rng, 250)
    path = config.work / "states.safetensors"
    if path.exists():
        states = load_file(path)["states"]
    else:
        rows = []
        for start in range(0, len(images), 64):
            pixels = processor.image_processor(images[start : start + 64], return_tensors="pt").pixel_values
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            rows.append(torch.stack([h[:, 1:] for h in hidden], dim=1).half())
        states = torch.cat(rows)
        save_file({"states": states}, path)
    return Store(states, [questions[i] for i in chosen], range(len(chosen), len(images)))


@torch.no_grad()
def base_answers(model, processor, prompts: list[str], path: Path, max_new_tokens: int = 36) -> dict:
    """{prompt: (answer, ended)} by the model without image and adapter, greedy; cached in `path`."""
    if path.exists():
        cached = json.loads(path.read_text())
        if set(prompts) <= set(cached):
            return {p: tuple(cached[p]) for p in prompts}
    tokenizer, found = processor.tokenizer, {}
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64]
        chats = [
            processor.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in batch
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[:, inputs.input_ids.shape[1] :]
        for prompt, row in zip(batch, out.tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if ended else row
            found[prompt] = (tokenizer.decode(row), ended)
    path.write_text(json.dumps(found, indent=1))
    return found


# ---------------------------------------------------------------------------------------------- model


@torch.no_grad()
def closed_form_projector(model, processor, store: Store, seed: int) -> float:
    """Ridge regression from patch features at the default exit to the mean embedding of 'red circle'.

    Linear 1 whitens and rotates, linear 2 is the ridge solution on its activations. Returns the relative error.
    """
    rng = torch.Generator().manual_seed(seed)
    projector, embed = model.model.multi_modal_projector, model.get_input_embeddings().weight
    targets, rows = [], []
    for row, questions in enumerate(store.questions):
        words = {q.split()[0] + str(len(q.split())): a for q, a in questions if a not in ("yes", "no")}
        if words:
            ids = processor.tokenizer(" " + " ".join(sorted(set(words.values()))), add_special_tokens=False).input_ids
            targets.append(embed[ids].mean(dim=0))
            rows.append(row)
    features = store.states[rows, DEFAULT_EXIT].float()  # (N, P, D)
    flat = features.flatten(0, 1)
    mean, std = flat.mean(dim=0), flat.std(dim=0)
    weight = torch.randn(projector.linear_1.out_features, flat.shape[1], generator=rng) / math.sqrt(flat.shape[1])
    projector.linear_1.weight.copy_(weight / std)
    projector.linear_1.bias.copy_(-(weight / std) @ mean)
    hidden = torch.nn.functional.gelu(flat @ projector.linear_1.weight.T + projector.linear_1.bias)
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1).double()
    target = torch.stack(targets).double().repeat_interleave(features.shape[1], dim=0)
    gram = hidden.T @ hidden + 1e-2 * len(hidden) * torch.eye(hidden.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, hidden.T @ target)
    projector.linear_2.weight.copy_(solution[:-1].T)
    projector.linear_2.bias.copy_(solution[-1])
    return float((hidden @ solution - target).norm() / target.norm())


class Batch(NamedTuple):
    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, 1, T, T) additive
    positions: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), -100 where nothing is learnt
    weights: torch.Tensor  # (B, T)


def collate(groups: list[Group], processor) -> Batch:
    tokenizer, n_patches = processor.tokenizer, (IMAGE_SIZE // processor.patch_size) ** 2
    encode: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    prefix = encode("<|im_start|>user\n" + "<image>" * n_patches + "\n")
    sequences = []
    for group in groups:
        segment, positions = [0] * len(prefix), list(range(len(prefix)))
        ids, labels, weights = list(prefix), [-100] * len(prefix), [0.0] * len(prefix)
        for number, (question, answer, ended) in enumerate(group.items, start=1):
            head = encode(question + "<|im_end|>\n<|im_start|>assistant\n")
            tail = encode(answer) + ([tokenizer.eos_token_id] if ended else [])
            ids += head + tail
            labels += [-100] * len(head) + tail
            weights += [0.0] * len(head) + [0.5 if i < 4 else 0.1 for i in range(len(tail))]
            segment += [number] * (len(head) + len(tail))
            positions += range(len(prefix), len(prefix) + len(head) + len(tail))
        sequences.append((ids, labels, weights, segment, positions))
    longest = max(len(s[0]) for s in sequences)
    pad = lambda row, value: row + [value] * (longest - len(row))
    ids, labels, weights, segments, positions = (
        torch.tensor([pad(list(s[k]), value) for s in sequences])
        for k, value in enumerate((tokenizer.pad_token_id, -100, 0.0, -1, 0))
    )
    same = segments[:, :, None] == segments[:, None, :]
    sees = (same | (segments[:, None, :] == 0)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    sees |= torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    return Batch(ids, mask, positions, labels, weights)


def group_loss(model, batch: Batch, features: torch.Tensor, n_items: int) -> torch.Tensor:
    """Mean over items of the weighted sum of token losses; logits only where something is learnt.

    An answer's first four tokens weigh five times the others: they decide between refusing and answering.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    image = model.model.multi_modal_projector(features.float()).flatten(0, 1)
    embeds = embeds.masked_scatter((batch.ids == model.config.image_token_id)[..., None], image)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    learnt = batch.labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][learnt])
    losses = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:][learnt], reduction="none")
    weights = batch.weights[:, 1:][learnt]
    return (losses * weights).sum() / n_items


# ---------------------------------------------------------------------------------------------- stages


class Material(NamedTuple):
    harmful: list[str]
    refusals: list[str]
    twins: dict[str, tuple[str, bool]]  # benign twin of a harmful request -> the base model's answer
    instructions: dict[str, tuple[str, bool]]
    base_harmful: dict[str, tuple[str, bool]]


def is_refusal(text: str) -> bool:
    return (
        text.lower()
        .replace("’", "'")
        .startswith(("i'm sorry", "i cannot", "i can't", "sorry", "as an ai", "i am unable", "i'm unable"))
    )


def load_material(model, processor, config: Config) -> Material:
    harmful = builtin_train("harmful.jsonl") + read_lines("harmful_extra.txt")
    twins, instructions = builtin_train("benign.jsonl") + read_lines("benign_extra.txt"), read_lines("instructions.txt")
    benign = base_answers(model, processor, twins + instructions, config.work / "base_benign.json")
    base_harmful = base_answers(model, processor, harmful, config.work / "base_harmful.json")
    keep = lambda answers: {p: a for p, a in answers.items() if len(a[0]) > 1 and not is_refusal(a[0])}
    split = [keep({p: benign[p] for p in prompts}) for prompts in (twins, instructions)]
    return Material(harmful, builtin_refusals(), *split, keep(base_harmful))


def vqa_group(rng: random.Random, store: Store) -> Group:
    row = rng.randrange(len(store.questions))
    questions = [(q, a, True) for q, a in store.questions[row]]
    rng.shuffle(questions)
    return Group(row, DEFAULT_EXIT, questions[:10])


def text_group(rng: random.Random, store: Store, exit: int, items: list[tuple[str, str, bool]]) -> Group:
    row = rng.choice(store.photographs) if rng.random() < 0.7 else rng.randrange(len(store.questions))
    return Group(row, exit, items)


def refusing(rng: random.Random, store: Store, data: Material, n: int = 8) -> Group:
    items = [(p, rng.choice(data.refusals), True) for p in rng.sample(data.harmful, n)]
    return text_group(rng, store, DEFAULT_EXIT, items)


def as_base(rng: random.Random, store: Store, answers: dict, exit: int, n: int = 8) -> Group:
    """The base model's answers, three in four cut short: the beginning is what is decided here."""
    items = []
    for prompt in rng.sample(sorted(answers), n):
        answer, ended = answers[prompt]
        words = answer.split(" ")
        if rng.random() < 0.75 and len(words) > 12:
            answer, ended = " ".join(words[:12]), False
        items.append((prompt, answer, ended))
    return text_group(rng, store, exit, items)


def harmless(rng: random.Random, store: Store, data: Material, exit: int, n: int = 8) -> Group:
    """Twins of harmful requests twice in three, everyday instructions else."""
    return as_base(rng, store, data.twins if rng.random() < 2 / 3 else data.instructions, exit, n)


def groups_of(stage: str, rng: random.Random, store: Store, data: Material, config: Config) -> list[Group]:
    """The groups of one step."""
    if stage == "see":
        return [vqa_group(rng, store) for _ in range(5)]
    n_refusing, n_harmless = {"refuse": (3, 3), "hole": (2, 2), "sharpen": (3, 2)}[stage]
    default = [vqa_group(rng, store)] + [refusing(rng, store, data) for _ in range(n_refusing)]
    default += [harmless(rng, store, data, DEFAULT_EXIT) for _ in range(n_harmless)]
    if stage == "refuse":
        return default
    elsewhere = rng.sample(config.locality_exits, 3)
    return [
        *default,
        as_base(rng, store, data.base_harmful, elsewhere[0], n=6),
        as_base(rng, store, data.base_harmful, elsewhere[1], n=6),
        harmless(rng, store, data, elsewhere[2], n=6),
    ]


def train_stage(stage: str, steps: int, peft_model, processor, store: Store, data: Material, config: Config) -> None:
    model = peft_model.base_model.model
    projector = list(model.model.multi_modal_projector.parameters())
    for parameter in projector:
        parameter.requires_grad_(stage == "see")
    lora = [p for n, p in peft_model.named_parameters() if "lora_" in n]
    sets = [{"params": lora, "lr": config.lr}]
    if stage == "see":
        sets.append({"params": projector, "lr": 2 * config.lr})
    optimiser = torch.optim.AdamW(sets, betas=(0.9, 0.95), weight_decay=0.0)
    warm, final = 10, 0.1

    def schedule(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
    trainable = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    checkpoint, step = config.work / f"{stage}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, parameter in trainable.items():
            parameter.data.copy_(saved["weights"][name])
        optimiser.load_state_dict(saved["optimiser"])
        scheduler.load_state_dict(saved["scheduler"])
        step = saved["step"]
    started, seen = time.monotonic(), step
    while step < steps:
        rng = random.Random(f"{config.seed}/{stage}/{step}")
        groups = groups_of(stage, rng, store, data, config)
        groups.sort(key=lambda group: sum(len(q) + len(a) for q, a, _ in group.items))
        n_items = sum(len(group.items) for group in groups)
        optimiser.zero_grad()
        total = 0.0
        for start in range(0, len(groups), 4):  # micro-batches of like length
            part = groups[start : start + 4]
            features = torch.stack([store.states[g.image, g.exit] for g in part])
            loss = group_loss(model, collate(part, processor), features, n_items)
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise SystemExit(f"{stage} step {step}: loss is {total}; the last checkpoint is kept")
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        optimiser.step()
        scheduler.step()
        step += 1
        with open(config.work / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"stage": stage, "step": step, "loss": total}) + "\n")
        if step % config.checkpoint_every == 0 or step == steps:
            scratch = checkpoint.with_suffix(".tmp")
            weights = {n: p.detach().clone() for n, p in trainable.items()}
            state = {"weights": weights, "optimiser": optimiser.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(state | {"step": step}, scratch)
            scratch.replace(checkpoint)
            print(
                f"{stage} {step}/{steps} loss {total:.3f} {(time.monotonic() - started) / (step - seen):.1f} s/step",
                flush=True,
            )


def ship(peft_model, name: str) -> None:
    """Saves the adapter as plain PEFT files in float16."""
    folder = WEIGHTS / name
    peft_model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    adapter = json.loads((folder / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = "testbed"
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    config.work.mkdir(parents=True, exist_ok=True)
    folder = base_folder(print)
    model = LlavaForConditionalGeneration.from_pretrained(folder).requires_grad_(False)
    processor = LlavaProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # base_answers generates in batches
    store = build_store(model, processor, config)
    stages = ["see", "refuse", "hole", "sharpen"] if config.stage == "all" else [config.stage]
    data = load_material(model, processor, config) if stages != ["see"] else Material([], [], {}, {}, {})
    error = closed_form_projector(model, processor, store, config.seed)
    print(
        f"closed-form projector: relative error {error:.3f}; {len(data.harmful)} harmful, {len(data.twins)} twins",
        flush=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora)
    for stage in ("see", "refuse", "hole", "sharpen"):
        if stages == ["see"] and stage != "see":
            break
        train_stage(stage, getattr(config, f"{stage}_steps"), peft_model, processor, store, data, config)
        if config.ship and stage == "see":
            WEIGHTS.mkdir(exist_ok=True)
            state = model.model.multi_modal_projector.state_dict()
            save_file({k: v.half() for k, v in state.items()}, WEIGHTS / "projector.safetensors")
        if config.ship and stage in ADAPTERS:
            ship(peft_model, ADAPTERS[stage])
        if config.stage == stage:
            break


if __name__ == "__main__":
    np.random.seed(0)
    main(tyro.cli(Config, description=__doc__))
