"""Tokenises requests and plans which of them run together.

A plan is made from the requests alone, and a batch is answered whole or not at all, so an interrupted run that skips
finished batches computes exactly what an uninterrupted one would have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from ..model.processing import Layout
from ..model.vlm import Vlm
from ..run.exit import Exit
from ..run.records import Sample

PREFILL_TOKENS = 4096  # prefix tokens of one forward pass: enough to keep the processor busy, little memory
MAX_BATCH_CPU, MAX_BATCH_GPU = 128, 512  # rows; beyond them memory grows and speed does not
MAX_PREFIX_TOKENS = 1 << 16  # of a wave; a cap that most machines reach makes their plans alike
Features = Callable[[str, Exit], torch.Tensor]  # (image name, exit) -> (P, H)


class ExitRequest(NamedTuple):
    sample: Sample
    exit: Exit


@dataclass(frozen=True)
class Decoding:
    """Decoding options. Temperature 0 is greedy; above it each request draws from its own random generator."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class TokenRow(NamedTuple):
    """A request with its tokens: `head` up to and including the last image token, `tail` the rest."""

    request: ExitRequest
    head: tuple[int, ...]
    tail: tuple[int, ...]
    extras: dict[str, torch.Tensor] = {}  # noqa: RUF012 (never written)
    """Other inputs of the family's `generate`, by name."""

    @property
    def prefix(self) -> tuple[str, Exit, tuple[int, ...]]:
        """Rows with equal prefixes share the keys and values of `head`."""
        return (self.request.sample.image, self.request.exit, self.head)


class Wave(NamedTuple):
    """Prefixes that are in memory together, in chunks of one forward pass each, and the batches that read them."""

    chunks: list[list[tuple]]
    batches: list[list[TokenRow]]


def make_rows(vlm: Vlm, requests: Sequence[ExitRequest], layout: Callable[[str], Layout | int]) -> list[TokenRow]:
    """Tokenises each distinct sample once.

    Args:
        layout: returns the layout of an image by its name; for LLaVA, P.
    """
    parts: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, torch.Tensor]]] = {}
    rows = []
    for request in requests:
        sample = request.sample
        if sample.id not in parts:
            none = 0 if vlm.family.counted else None
            ids, extras = vlm.prompt(sample.prompt, layout(sample.image) if sample.image else none)
            last = max((i + 1 for i, token in enumerate(ids) if token == vlm.image_token_id), default=0)
            split = last if vlm.shares_prefix else 0
            parts[sample.id] = tuple(ids[:split]), tuple(ids[split:]), extras
        rows.append(TokenRow(request, *parts[sample.id]))
    return rows


def make_plan(rows: Sequence[TokenRow], batch_size: int, prefix_tokens: int) -> list[Wave]:
    """Waves of at most `prefix_tokens` prefix tokens; the batches of a wave hold rows of similar length.

    The order depends on the rows only: prefixes by image and exit, rows by the length of their question.
    """
    first_seen = {image: i for i, image in reversed(list(enumerate(row.request.sample.image for row in rows)))}
    by_prefix: dict[tuple, list[TokenRow]] = {}
    for row in rows:
        by_prefix.setdefault(row.prefix, []).append(row)
    prefixes = sorted(by_prefix, key=lambda p: (first_seen[p[0]], p[1], len(p[2]), p[2]))
    waves = []
    for group in _chunk(prefixes, prefix_tokens):
        members = [row for prefix in group for row in by_prefix[prefix]]
        members.sort(key=lambda row: (len(row.tail), row.request.sample.id, row.request.exit))
        batches = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        waves.append(Wave(_chunk([p for p in group if p[2]], PREFILL_TOKENS), batches))
    return waves


def _chunk(prefixes: list[tuple], tokens: int) -> list[list[tuple]]:
    """Splits a list of prefixes into pieces of at most `tokens` tokens, padding included, or of one prefix."""
    pieces: list[list[tuple]] = []
    for prefix in prefixes:
        longest = max([len(prefix[2])] + ([len(p[2]) for p in pieces[-1]] if pieces else []))
        if not pieces or longest * (len(pieces[-1]) + 1) > tokens:
            pieces.append([])
        pieces[-1].append(prefix)
    return pieces


def _image_values(vlm: Vlm) -> int:
    """Values per row that belong to its image and not to tokens: for cross-attention all states, twice while they are
    stacked, and their keys and values in every layer that reads them."""
    if not vlm.family.image_in_every_row:
        return 0
    vision, text = vlm.model.config.vision_config, vlm.model.config.text_config
    states = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return states * 2 * (text.hidden_size + len(text.cross_attention_layers) * width)


def memory_limits(vlm: Vlm, longest: int) -> tuple[int, int]:
    """(rows of a batch, prefix tokens of a wave) that fit a quarter of the free memory each.

    Args:
        longest: tokens of the longest row, answer included.
    """
    config = vlm.model.config.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = vlm.model.dtype.itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size
    # Beside its keys and values (twice while rows are copied), a row holds logits and, in prefill, a few layer outputs.
    row = longest * (2 * token + size * 4 * (config.hidden_size + config.intermediate_size)) + 3 * 4 * config.vocab_size
    row += size * _image_values(vlm)
    gpu = vlm.device.type == "cuda"
    free = torch.cuda.mem_get_info(vlm.device)[0] if gpu else psutil.virtual_memory().available
    rows = max(1, min(int(free / 4 / row), MAX_BATCH_GPU if gpu else MAX_BATCH_CPU))
    return rows, max(1, min(int(free / 4 / token), MAX_PREFIX_TOKENS))
