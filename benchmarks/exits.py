"""Measures the cost of all exits relative to one encode: one process, alternating measurements.

    clip     24 blocks x 1024 wide, 336 px, one image (random weights): encoding once with the hooks
             that keep every state, over the plain encode; and the same with the replay of all exits' features
    mllama   blocks, global encoder and projector in Llama 3.2 Vision's proportions, scaled down (`mllama_shape`): all
             exits from one encode against an encode an exit (the model cut after each), beside the ratio of FLOP

    python benchmarks/exits.py [--rounds 7]

Prints one JSON object; the smallest of the rounds is taken, as the machine may be busy.
"""

import json
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaVisionConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from exitwise.model.exits import encode, exit_at, replay
from exitwise.model.vlm import Vlm, describe


@dataclass(frozen=True)
class Config:
    rounds: int = 7


def bare(model: Any) -> Vlm:
    """No processor is needed: the pixels are random."""
    return describe("benchmark", model.eval().requires_grad_(False), SimpleNamespace(tokenizer=SimpleNamespace()))


def clip() -> tuple[Vlm, dict[str, torch.Tensor]]:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    return bare(model), {"pixel_values": torch.randn(1, 3, 336, 336)}


def mllama() -> tuple[Vlm, dict[str, torch.Tensor]]:
    """Width 256 instead of 1280, 140 px instead of 560 (101 patches a tile); 32 + 8 blocks and 4 tiles as they are."""
    vision = MllamaVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=32, num_global_layers=8, attention_heads=4,
        image_size=140, patch_size=14, max_num_tiles=4, intermediate_layers_indices=[3, 7, 15, 23, 30],
        vision_output_dim=256 * 6,
    )  # fmt: skip
    text = MllamaTextConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, cross_attention_layers=[0], pad_token_id=0,
    )  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=63))
    return bare(model), {
        "pixel_values": torch.randn(1, 1, 4, 3, 140, 140),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    }


def seconds(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


@torch.inference_mode()
def plain(vlm: Vlm, inputs: dict[str, torch.Tensor]) -> None:
    vlm.family.features(vlm.model, dict(inputs))


def replayed(vlm: Vlm, inputs: dict[str, torch.Tensor], states: list[torch.Tensor]) -> None:
    for exit in range(vlm.n_blocks + 1):
        replay(vlm, inputs, states, exit)


def once(vlm: Vlm, inputs: dict[str, torch.Tensor]) -> None:
    replayed(vlm, inputs, encode(vlm, inputs))


def again(vlm: Vlm, inputs: dict[str, torch.Tensor]) -> None:
    for exit in range(vlm.n_blocks + 1):
        with exit_at(vlm, exit):
            plain(vlm, inputs)


def flop_ratio(vlm: Vlm, inputs: dict[str, torch.Tensor]) -> float:
    """Multiply-adds of an encode an exit over those of one encode and all replays, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for function in (again, once):
        with FlopCounterMode(display=False) as counter:
            function(vlm, inputs)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


def main(config: Config) -> None:
    torch.manual_seed(0)
    vlm, inputs = clip()
    states = encode(vlm, inputs)
    rounds = [(seconds(plain, vlm, inputs), seconds(encode, vlm, inputs), seconds(replayed, vlm, inputs, states))
              for _ in range(config.rounds + 1)][1:]  # fmt: skip
    bare_s, hooked_s, replay_s = (min(column) for column in zip(*rounds, strict=True))
    del vlm, states
    vlm, inputs = mllama()
    pairs = [(seconds(once, vlm, inputs), seconds(again, vlm, inputs)) for _ in range(config.rounds)]
    once_s, again_s = (min(column) for column in zip(*pairs, strict=True))
    found = {
        "threads": torch.get_num_threads(),
        "clip_plain_seconds": round(bare_s, 3),
        "clip_all_states_seconds": round(hooked_s, 3),
        "clip_all_states_ratio": round(hooked_s / bare_s, 3),
        "clip_replay_25_exits_seconds": round(replay_s, 3),
        "clip_all_exits_ratio": round((hooked_s + replay_s) / bare_s, 3),
        "mllama_shape": "32+8 blocks x 256, 4 tiles x 101 patches (real: x 1280, 1601 patches)",
        "mllama_once_seconds": round(once_s, 3),
        "mllama_again_seconds": round(again_s, 3),
        "mllama_ratio": round(again_s / once_s, 2),
        "mllama_flop_ratio": round(flop_ratio(vlm, inputs), 2),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
