"""Measures the cost of every exit: parameters, bytes, FLOPs and seconds of encoder, projector and prefill.

One request runs through the stock model from pixels to the logits of its first new token, with a mark at each
boundary that hooks can see: before and after every block of the encoder, and where the language model begins.

    pixels ─▶ patches ─▶ block 1 … block L ─▶ norm, projector ─▶ language model ─▶ logits of the first token
              └──── encoder, to exit l ──┘    └─ projector ──┘   └───────────── prefill ────────────┘

Exit l needs what lies before the blocks, the first l blocks, and all that follows them; the other L - l blocks are what
it saves. So one pass gives the figures of every exit: FLOPs and parameters exactly, seconds as the sum of the parts.
FLOPs are those of torch's counter on the real modules: 2 for each multiply-add of a matrix product, convolution or
attention (causal attention counted in full), nothing for the rest.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import UserError
from ..run.exit import Exit
from .exit_names import parse_exits
from .exits import exit_at
from .vlm import Vlm

if TYPE_CHECKING:
    from transformers import BatchFeature

V_co = TypeVar("V_co", covariant=True)

PROMPT = "What is shown in this picture?"
REPETITIONS, LEAST, BUDGET = 9, 3, 2.0
"""Timed passes at the most, at the least, and the seconds after which there are no more of them."""

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch 2.13 counts it as nothing


class PassMark(NamedTuple, Generic[V_co]):
    """The reading of a counter or clock at a place of a pass: `start`, `enter` or `leave` a block, `prefill`, `end`."""

    place: str
    value: V_co
    block: int = -1


class Parts(NamedTuple):
    """One quantity of a pass, by part: before the first block, each block, after them, in the language model."""

    before: float
    blocks: list[float]
    after: float
    prefill: float

    def at(self, exit: int) -> dict[str, float]:
        """The quantity at an exit, by part of the model."""
        encoder = self.before + sum(self.blocks[:exit])
        return {
            "encoder": encoder,
            "projector": self.after,
            "prefill": self.prefill,
            "total": encoder + self.after + self.prefill,
        }


@torch.inference_mode()
def exit_costs(
    vlm: Vlm,
    exits: Sequence[Exit | int] | str = "all",
    *,
    image: Image.Image | None = None,
    prompt: str = PROMPT,
    repetitions: int = REPETITIONS,
) -> dict[str, Any]:
    """The cost of one request up to its first new token, by exit, ready for JSON (keys: docs/reference/metrics.md).

    Args:
        exits: numbers, or text as in the option `--exits`; the default exit is added, as the baseline.
        image: of the request; without it, a grey square of 224 x 224 pixels. FLOPs of models that cut large images
            into tiles depend on its size.
        prompt: of the request; the cost of prefill grows with its length.
        repetitions: timed passes, after the one that counts; fewer once BUDGET seconds are over, 0 for no latency.

    Returns:
        model, default_exit, n_blocks, request, device, dtype, threads, repetitions, and for each exit `parameters`,
        `bytes`, `flops` and `seconds` by part.

    Raises:
        UserError: an exit does not exist, the prompt has a control token, or the encoder did not run.
    """
    wanted = exits if isinstance(exits, str) else ",".join(map(str, exits))
    numbers = parse_exits(f"{wanted},default", vlm.n_blocks, vlm.default_exit)
    inputs = request_inputs(vlm, prompt, image or Image.new("RGB", (224, 224), (127, 127, 127)))
    flops, parameters, sizes = _count(vlm, inputs)
    times = _time(vlm, inputs, repetitions)
    on_cpu = vlm.device.type == "cpu"
    return {
        "model": vlm.name,
        "default_exit": vlm.default_exit,
        "n_blocks": vlm.n_blocks,
        "request": {
            "tokens": inputs["input_ids"].shape[1],
            "image_tokens": int((inputs["input_ids"] == vlm.model.config.image_token_id).sum()),
        },
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(vlm.device),
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if on_cpu else None,
        "repetitions": len(times),
        "exits": [
            {
                "exit": exit,
                "parameters": _held(parameters, deepest),
                "bytes": _held(sizes, deepest),
                "flops": flops.at(deepest),
                "seconds": _quartiles([parts.at(deepest) for parts in times]),
            }
            for exit in numbers
            for deepest in [exit.deepest]  # layers that are fused are all there once the deepest has run
        ],
    }


def request_inputs(vlm: Vlm, prompt: str, image: Image.Image) -> "BatchFeature":
    """The request from the model's own processor, on the model's device and in its dtype."""
    text, bos = vlm.chat(prompt), vlm.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    made = vlm.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=special)
    made.pop("labels", None)  # PaliGemma's processor gives some, and the model would compute a loss
    return made.to(vlm.device, vlm.model.dtype)


def _pass(vlm: Vlm, inputs: "BatchFeature", read: Callable[[], V_co]) -> list[PassMark[V_co]]:
    """One pass through all blocks up to the first new token; `read` is called at every mark."""
    marks: list[PassMark[V_co]] = []

    def marker(place: str, block: int = -1) -> Callable[..., None]:
        return lambda *_, **__: marks.append(PassMark(place, read(), block))

    hooks = [vlm.model.get_decoder().register_forward_pre_hook(marker("prefill"))]
    for index, block in enumerate(vlm.blocks):
        hooks.append(block.register_forward_pre_hook(marker("enter", index)))
        hooks.append(block.register_forward_hook(marker("leave", index)))
    try:
        with exit_at(vlm, vlm.n_blocks):  # the default exit may leave blocks out
            marker("start")()
            vlm.model(**inputs, use_cache=True, logits_to_keep=1)
            marker("end")()
    finally:
        for hook in hooks:
            hook.remove()
    return marks


def parts_of(marks: Sequence[PassMark[float]], n_blocks: int) -> Parts:
    """Differences between the marks of a pass. A block that runs several times (tile by tile) costs their sum.

    What runs between a block and the next one, such as a tap of its state, is that block's.

    Raises:
        UserError: no block ran before the language model did.
    """
    first = {mark.place: mark.value for mark in reversed(marks)}
    if "enter" not in first or "prefill" not in first:
        raise UserError(
            "the image encoder did not run on this request; give a prompt and an image that the model takes"
        )
    blocks: list[float] = [0] * n_blocks
    since, ran = first["enter"], -1
    for mark in marks:
        if mark.place == "enter":
            if mark.block == ran + 1 and ran >= 0:
                blocks[ran] += mark.value - since
            since = mark.value
        elif mark.place == "leave":
            blocks[mark.block] += mark.value - since
            since, ran = mark.value, mark.block
    before = first["enter"] - first["start"]
    after = first["prefill"] - first["start"] - before - sum(blocks)
    return Parts(before, blocks, after, first["end"] - first["prefill"])


def _count(vlm: Vlm, inputs: "BatchFeature") -> tuple[Parts, Parts, Parts]:
    """FLOPs, parameters and bytes by part."""
    mapping = {_CPU_ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with _places(vlm) as places, counter:
        marks = _pass(vlm, inputs, counter.get_total_flops)
    flops = parts_of(marks, vlm.n_blocks)
    return flops, _weigh(vlm, places, torch.Tensor.numel), _weigh(vlm, places, lambda p: p.nbytes)


@contextmanager
def _places(vlm: Vlm) -> Iterator[dict[nn.Module, str | int]]:
    """Within it, notes for every module whether it first ran before the first block, after the last, or after which."""
    places: dict[nn.Module, str | int] = {}
    order = {block: index for index, block in enumerate(vlm.blocks)}
    latest = -1

    def note(module: nn.Module, *_: object) -> None:
        nonlocal latest
        latest = order.get(module, latest)
        between: str | int = latest if latest < len(order) - 1 else "after"
        places.setdefault(module, "before" if latest < 0 else between)

    hooks = [module.register_forward_pre_hook(note) for module in vlm.model.modules()]
    try:
        yield places
    finally:
        for hook in hooks:
            hook.remove()


def _weigh(vlm: Vlm, places: dict[nn.Module, str | int], weight: Callable[[torch.Tensor], int]) -> Parts:
    """The parameters of the model by part, a shared one once.

    Blocks and language model are known as such, whatever they hold included. Another module belongs where it ran, and
    one that did not run where the module around it belongs.
    """
    known: dict[nn.Module, str | int] = {block: index for index, block in enumerate(vlm.blocks)}
    known |= dict.fromkeys((vlm.model.get_decoder(), vlm.model.get_output_embeddings()), "prefill")
    part: dict[str, str | int] = {}
    owned: dict[int, tuple[str | int, int]] = {}
    for name, module in vlm.model.named_modules(remove_duplicate=False):  # a module comes after the one around it
        around = part.get(name.rpartition(".")[0], "before")
        inside = isinstance(around, int) or around == "prefill"
        part[name] = known.get(module, around if inside else places.get(module, around))
        for parameter in module.parameters(recurse=False):
            owned.setdefault(id(parameter), (part[name], weight(parameter)))
    total: dict[str | int, int] = {}
    for where, size in owned.values():
        total[where] = total.get(where, 0) + size
    blocks: list[float] = [total.get(index, 0) for index in range(vlm.n_blocks)]
    return Parts(total.get("before", 0), blocks, total.get("after", 0), total.get("prefill", 0))


def _held(parts: Parts, exit: int) -> dict[str, float]:
    """Parameters or bytes of a model without the blocks that the exit does not run."""
    return {"language_model" if part == "prefill" else part: size for part, size in parts.at(exit).items()}


def _time(vlm: Vlm, inputs: "BatchFeature", repetitions: int) -> list[Parts]:
    """Seconds by part of each pass; the one that counted FLOPs has warmed up caches and allocator."""
    passes: list[Parts] = []
    began = time.monotonic()
    while len(passes) < repetitions and (len(passes) < LEAST or time.monotonic() - began < BUDGET):
        passes.append(parts_of(_clocked(vlm, inputs), vlm.n_blocks))
    return passes


def _clocked(vlm: Vlm, inputs: "BatchFeature") -> list[PassMark[float]]:
    """The marks of a pass in seconds; on a GPU by events on its stream, so that nothing waits at a mark."""
    if vlm.device.type != "cuda":
        return _pass(vlm, inputs, time.perf_counter)

    def read() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    with torch.cuda.device(vlm.device):
        torch.cuda.synchronize()
        marks = _pass(vlm, inputs, read)
        torch.cuda.synchronize()
    start = marks[0].value
    return [PassMark(mark.place, start.elapsed_time(mark.value) / 1000, mark.block) for mark in marks]


def _quartiles(passes: Sequence[dict[str, float]]) -> dict[str, dict[str, float]] | None:
    """Median and quartiles over the passes, by part; None where none was timed."""
    if not passes:
        return None
    found = {part: np.quantile([seconds[part] for seconds in passes], (0.25, 0.5, 0.75)) for part in passes[0]}
    return {
        part: {key: round(float(value), 7) for key, value in zip(("low", "median", "high"), values, strict=True)}
        for part, values in found.items()
    }
