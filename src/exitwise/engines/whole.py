"""Answers batches of any mix of (sample, exit) requests by the model's own `generate`, rows whole and left-padded.

For families where the part of a prompt up to its image cannot be computed apart: positions in three dimensions
(qwen), attention both ways within the image or the whole prompt (paligemma, gemma), cross-attention (mllama), windows.
Image features at each row's exit go in where the family takes encoded images; positions, masks and caches are the
model's own. Rows that finished stay in their batch until its end.

Shapes: B rows, T tokens of the longest row, P rows of an image's features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import LogitsProcessor

from ..model.vlm import Vlm
from ..run.records import Completion
from .plan import Decoding, Features, TokenRow
from .sampling import choose, completion, generator_of


def answer_batch(vlm: Vlm, rows: Sequence[TokenRow], features: Features, decoding: Decoding) -> list[Completion]:
    """Completions of the rows, in their order."""
    inputs = batch_inputs(vlm, rows, features)
    drawing = [_Draw(rows, decoding)] if decoding.temperature else []
    config = vlm.greedy(decoding.max_new_tokens)
    with _states_once(vlm):
        found = vlm.model.generate(**inputs, generation_config=config, logits_processor=drawing)
    longest = max(len(row.head) + len(row.tail) for row in rows)
    answers = found[:, longest:].tolist()
    return [completion(vlm, row, _until(ids, vlm.stop_ids)) for row, ids in zip(rows, answers, strict=True)]


def batch_inputs(vlm: Vlm, rows: Sequence[TokenRow], features: Features) -> dict[str, object]:
    """Arguments of `generate` for these rows: ids and mask (B, T), the family's extras, features of their images."""
    whole = [row.head + row.tail for row in rows]
    longest, device = max(map(len, whole)), vlm.device
    ids = torch.full((len(rows), longest), vlm.tokenizer.pad_token_id or 0, device=device)
    mask = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
    for i, row in enumerate(whole):
        ids[i, longest - len(row) :] = torch.tensor(row, device=device)
        mask[i, longest - len(row) :] = 1
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": mask}
    pictured = [row for row in rows if row.request.sample.image]
    for name in vlm.family.token_inputs if pictured or not vlm.family.image_in_every_row else ():
        if (values := _per_token(name, rows, longest, device)) is not None:
            inputs[name] = values
    for name in vlm.family.grid_inputs:
        parts = [row.extras[name] for row in pictured if name in row.extras]
        inputs |= {name: torch.cat(parts).to(device)} if parts else {}
    if pictured:
        found = {id(row): features(row.request.sample.image, row.request.exit) for row in pictured}
        if vlm.family.image_in_every_row:
            none = torch.zeros_like(next(iter(found.values())))
            inputs |= vlm.family.placed(vlm.model, [found.get(id(row), none) for row in rows])
        else:
            inputs |= vlm.family.placed(vlm.model, [found[id(row)] for row in pictured])
    return inputs


def answered(vlm: Vlm, row: TokenRow, answer: Sequence[int]) -> TokenRow:
    """The row with an answer after its prompt, for a forward pass over both.

    The family's extras continue as in `generate`: an answer is text with causal attention, and sees the same part of
    the image as the last token of the prompt.
    """
    extras = dict(row.extras)
    for name in vlm.family.token_inputs:
        if (value := extras.get(name)) is None:
            continue
        if name == "cross_attention_mask":
            more = value[:, -1:].expand(-1, len(answer), *value.shape[2:])
        else:
            more = value.new_full((1, len(answer)), int(name in vlm.family.forward_inputs))
        extras[name] = torch.cat([value, more], dim=1)
    return row._replace(tail=row.tail + tuple(answer), extras=extras)


def _per_token(name: str, rows: Sequence[TokenRow], longest: int, device: torch.device) -> torch.Tensor | None:
    """(B, T, ...) values of the rows, zeros where they are padded; None where no row has any."""
    given = [row.extras.get(name) for row in rows]
    shape = max((value.shape[2:] for value in given if value is not None), key=len, default=None)
    if shape is None:
        return None
    kind = next(value.dtype for value in given if value is not None)
    whole = torch.zeros((len(rows), longest, *shape), dtype=kind, device=device)
    for i, value in enumerate(given):
        if value is not None and value.shape[2:] == shape:
            whole[i, longest - value.shape[1] :] = value[0].to(device)
    return whole


def _until(ids: list[int], stop: set[int]) -> list[int]:
    """The ids up to and including the first that ends an answer."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
    return ids[:end]


class _Draw(LogitsProcessor):
    """Makes greedy decoding choose the token that the row's own generator draws."""

    def __init__(self, rows: Sequence[TokenRow], decoding: Decoding):
        self.decoding = decoding
        self.generators = [generator_of(row.request, decoding.seed) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        tokens = choose(scores.float(), self.decoding, self.generators)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@contextmanager
def _states_once(vlm: Vlm) -> Iterator[None]:
    """Within it cross-attention states are passed at the first step only; later they would enter the cache twice."""
    prepare = vlm.model.prepare_inputs_for_generation

    def first_only(*args: object, is_first_iteration: bool = False, **kwargs: object) -> dict[str, object]:
        if not is_first_iteration:
            kwargs.pop("cross_attention_states", None)
        return prepare(*args, is_first_iteration=is_first_iteration, **kwargs)

    if not vlm.family.image_in_every_row:
        yield
        return
    vlm.model.prepare_inputs_for_generation = first_only
    try:
        yield
    finally:
        del vlm.model.prepare_inputs_for_generation
