"""Times all exits x 40 prompts x 32 new tokens on the testbed: the engine against two usual loops, in one run.

    (a) one prompt, one exit at a time, the encoder run again for each (the loop of published demos)
    (b) `generate` in batches of 32 at one exit after the other, the encoder run again for each batch

    python benchmarks/sweep.py [--photographs 10] [--prompts 40] [--share-of-a 1.0]

Lower bound, set before the first measurement: a forward pass costs 2 x 106.2 M multiply-adds per token in the blocks
and 2 x 28.3 M more where a next token is chosen. With P image tokens in the prefix, prefilled once per (photograph,
exit), the engine needs at least `floor_tflop` operations; at the machine's measured matrix speed that is
`floor_seconds`. The prediction was that the engine reaches 60 % of this speed.

Prints one JSON object; ratios are of wall time in this run. Answers are compared one by one; where two differ, the
difference of the two best logits at the first differing token is given (a tie within rounding is below 1e-3).
"""

import json
import time
from dataclasses import dataclass

import torch
import tyro

from exitwise import Sample, exit_at, exit_features, load_vlm
from exitwise.data.images import BUILTIN_PHOTOGRAPHS, load_image
from exitwise.data.prompts import builtin_benign
from exitwise.engines import prefix


@dataclass(frozen=True)
class Config:
    photographs: int = 10
    prompts: int = 40
    new_tokens: int = 32
    share_of_a: float = 1.0
    """Measure (a) on this share of the requests and scale up; 1 measures all."""


def matrix_speed() -> float:
    """GFLOP/s of a float32 product of the model's commonest shape at batch 128 (gate and up projection)."""
    left, right = torch.randn(128, 576), torch.randn(576, 1536)
    for _ in range(50):
        left @ right
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        left @ right
        n += 1
    return n * 2 * 128 * 576 * 1536 / (time.perf_counter() - started) / 1e9


def floor_flop(vlm, rows, completions) -> float:
    """Operations that no way of sharing prefixes can save: each distinct prefix, question and new token once."""
    language_model = vlm.model.model.language_model
    blocks = 2 * sum(p.numel() for p in language_model.layers.parameters())
    head = 2 * vlm.model.lm_head.weight.numel()
    prefix = sum(len(head_ids) for _, _, head_ids in {row.prefix for row in rows})
    question = sum(len(row.tail) for row in rows)
    new = sum(len(c.tokens) for c in completions.values())
    return (prefix + question + new - len(rows)) * blocks + new * head


def engine(vlm, requests, images, config):
    exits = range(vlm.n_blocks + 1)
    features = {name: exit_features(vlm, image, exits) for name, image in images.items()}
    rows = prefix.make_rows(vlm, requests, lambda name: len(features[name][0]))
    longest = max(len(r.head) + len(r.tail) for r in rows) + config.new_tokens
    batch, prefix_tokens = prefix.memory_limits(vlm, longest)
    found = {}
    for wave in prefix.make_plan(rows, batch, prefix_tokens):
        for _, part in prefix.answer_wave(vlm, wave, lambda n, e: features[n][e], prefix.Decoding(config.new_tokens)):
            found |= {(c.sample, c.exit): c for c in part}
    return found, rows


@torch.inference_mode()
def plain(vlm, requests, images, config, batch):
    """generate in batches of `batch`, exit by exit, pixels in."""
    found = {}
    for exit in range(vlm.n_blocks + 1):
        mine = [r for r in requests if r.exit == exit]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            texts = [vlm.chat(r.sample.prompt) for r in part]
            pictures = [images[r.sample.image] for r in part]
            inputs = vlm.processor(images=pictures, text=texts, return_tensors="pt", padding=True)
            with exit_at(vlm, exit):
                out = vlm.model.generate(**inputs, max_new_tokens=config.new_tokens, do_sample=False)
            for request, row in zip(part, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                found[request.sample.id, exit] = row
    return found


def differences(vlm, ours, theirs, requests, images) -> list[dict]:
    """Answers that differ, with the gap between the two tokens' logits where they part."""
    stop, found = vlm.tokenizer.eos_token_id, []
    samples = {r.sample.id: r.sample for r in requests}
    for (name, exit), other in theirs.items():
        mine = list(ours[name, exit].tokens)
        other = other[: other.index(stop) + 1] if stop in other else other
        if mine == other:
            continue
        split = next(
            (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
        )
        sample = samples[name]
        inputs = vlm.processor(images=images[sample.image], text=vlm.chat(sample.prompt), return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([mine[:split]], dtype=torch.long)], dim=1)
        with exit_at(vlm, exit), torch.inference_mode():
            logits = vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        found.append(
            {"sample": name, "exit": exit, "token": split, "gap": float(logits[mine[split]] - logits[other[split]])}
        )
    return found


def timed(function, *arguments):
    started = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - started


def main(config: Config) -> None:
    vlm = load_vlm("testbed")
    names = [f"photo:{n}" for n in BUILTIN_PHOTOGRAPHS[: config.photographs]]
    images = {name: load_image(name, None) for name in names}
    prompts = [s.prompt for s in builtin_benign("test")][: config.prompts]
    samples = [Sample(f"p{i}", p, "benign", names[i % len(names)]) for i, p in enumerate(prompts)]
    requests = [prefix.ExitRequest(s, e) for s in samples for e in range(vlm.n_blocks + 1)]
    engine(vlm, requests[:26], images, Config(new_tokens=4))  # warm-up
    speed = matrix_speed()
    (ours, rows), seconds = timed(engine, vlm, requests, images, config)
    flop = floor_flop(vlm, rows, ours)
    theirs_b, seconds_b = timed(plain, vlm, requests, images, config, 32)
    every = max(1, round(1 / config.share_of_a))
    theirs_a, seconds_a = timed(plain, vlm, requests[::every], images, config, 1)
    seconds_a *= len(requests) / len(requests[::every])
    print(
        json.dumps(
            {
                "requests": len(requests),
                "new_tokens": sum(len(c.tokens) for c in ours.values()),
                "threads": torch.get_num_threads(),
                "gflops_matrix": round(speed, 1),
                "floor_tflop": round(flop / 1e12, 2),
                "floor_seconds": round(flop / speed / 1e9, 1),
                "engine_seconds": round(seconds, 1),
                "share_of_floor": round(flop / speed / 1e9 / seconds, 3),
                "a_seconds": round(seconds_a, 1),
                "a_measured_requests": len(requests[::every]),
                "b_seconds": round(seconds_b, 1),
                "ratio_a": round(seconds_a / seconds, 2),
                "ratio_b": round(seconds_b / seconds, 2),
                "differences_a": differences(vlm, ours, theirs_a, requests, images),
                "differences_b": differences(vlm, ours, theirs_b, requests, images),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
