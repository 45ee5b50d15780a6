"""Chooses tokens, greedily or with one generator per request, so that batching cannot change the answers."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch

from ..model.vlm import Vlm
from ..run.exit import Exit
from ..run.records import Completion
from .plan import Decoding, ExitRequest, TokenRow


def choose(logits: torch.Tensor, decoding: Decoding, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Next tokens (B,) from logits (B, V).

    Args:
        generators: one a row; unused where decoding is greedy.
    """
    if not decoding.temperature:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / decoding.temperature, dim=-1)
    order = None
    if decoding.top_p < 1:  # sorting a vocabulary takes longer than a small model's whole step
        probs, order = probs.sort(dim=-1, descending=True)
        below = probs.cumsum(dim=-1)
        probs = probs.masked_fill(below - probs >= decoding.top_p, 0.0)  # the smallest set that reaches top_p
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    cumulative = probs.double().cumsum(dim=-1)
    target = draws.to(logits.device)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[1] - 1)
    return (places if order is None else order.gather(1, places))[:, 0]


def generator_of(request: ExitRequest, seed: int) -> torch.Generator:
    """A generator that depends on the request and the seed only, so that batching cannot change what is drawn."""
    layers = Exit.of(request.exit).layers
    # A set of layers is seeded as exitwise 0.1.0 wrote it, one number: a run that it began draws the same answers here.
    name = str(layers[0]) if len(layers) == 1 else "1" + "".join(f"{layer:03}" for layer in layers)
    digest = hashlib.sha256(f"{seed}\0{request.sample.id}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def completion(vlm: Vlm, row: TokenRow, ids: list[int]) -> Completion:
    """The record of a row's answer."""
    text = vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
    finish: Literal["stop", "length"] = "stop" if ids and ids[-1] in vlm.stop_ids else "length"
    return Completion(row.request.sample.id, row.request.exit, text, tuple(ids), finish)
