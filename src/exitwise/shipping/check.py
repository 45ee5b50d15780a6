"""Compares logits and greedy tokens of a slim checkpoint, loaded by transformers, with the full model at the exit."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from ..data.images import load_image
from ..errors import UserError
from ..model.costs import request_inputs
from ..model.quiet import quiet
from ..model.vlm import Vlm, describe
from .note import CheckResult

if TYPE_CHECKING:
    from ..model.types import StockModel, StockProcessor

QUESTIONS = (("coffee", "What is this?"), ("chelsea", "Is there an animal in the picture?"), ("rocket", "Say hello."))
TOKENS = 16
TOLERANCE = 1e-4
"""Most that a logit may differ, relative to the largest: float32 rounding is a hundred times below it."""


class CheckAnswers(NamedTuple):
    """A model's output for each question of the check: logits (T, V) of the prompt, greedy tokens."""

    logits: list[torch.Tensor]
    tokens: list[list[int]]


@torch.inference_mode()
def answers(vlm: Vlm) -> CheckAnswers:
    """The model's output for the questions of the check, greedy."""
    logits, tokens = [], []
    for photo, question in QUESTIONS:
        inputs = request_inputs(vlm, question, load_image(f"photo:{photo}", None))
        logits.append(vlm.model(**inputs).logits[0].float().cpu())
        found = vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        tokens.append(found[0, inputs["input_ids"].shape[1] :].tolist())
    return CheckAnswers(logits, tokens)


def compare(wanted: CheckAnswers, got: CheckAnswers) -> CheckResult:
    """The distance of the slim model from the full one at the exit.

    Raises:
        UserError: a logit differs by more than float32 rounding, or a token differs.
    """
    scale = max(float(each.abs().max()) for each in wanted.logits)
    if [each.shape for each in wanted.logits] != [each.shape for each in got.logits]:
        raise UserError("the slim model tokenises the check's prompts differently from the full one; nothing is kept")
    apart = max(float((a - b).abs().max()) for a, b in zip(wanted.logits, got.logits, strict=True))
    if not apart <= TOLERANCE * scale or wanted.tokens != got.tokens:
        same = "the same" if wanted.tokens == got.tokens else "other"
        raise UserError(
            f"the slim model differs from the full model at this exit: logits differ by {apart:.2g} "
            f"(largest {scale:.3g}), {same} greedy tokens; nothing is kept, please report it"
        )
    return CheckResult(len(QUESTIONS), sum(len(row) for row in wanted.tokens), scale, apart)


def reload(folder: Path, device: torch.device, exit: int) -> Vlm:
    """The model of a slim folder in float32, loaded as a user of transformers loads it.

    Raises:
        UserError: it pads on the right, or has other blocks or another default exit than it was cut to.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        processor = cast("StockProcessor", AutoProcessor.from_pretrained(folder))
    if processor.tokenizer.padding_side != "left":
        raise UserError("the saved tokenizer pads on the right; nothing is kept, please report it")
    again = describe(str(folder), cast("StockModel", model).to(device).eval(), processor)
    if (again.n_blocks, again.default_exit) != (exit, exit):
        raise UserError(
            f"the saved model has {again.n_blocks} blocks and exit {again.default_exit}, not {exit}; nothing is kept, "
            "please report it"
        )
    return again
