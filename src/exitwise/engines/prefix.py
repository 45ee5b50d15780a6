"""Answers any mix of (sample, exit) requests, computing each shared prefix once.

The chat of a request is [text + image at exit l] + [question]. All questions about one image at one exit share the
first part, so its keys and values are computed once (`_prefill`) and copied into the rows of a batch (`_Batch`), which
goes on with the questions, left-padded between the two. Rows are decoded together; finished rows leave (`_decode`).

Families whose prompts cannot be taken apart like this are answered row by whole row (engines/whole.py).

Shapes: B rows, T tokens so far, V vocabulary, N prefixes, P image tokens, H width of the language model.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..model.compat import CACHE
from ..model.vlm import Vlm
from ..run.records import Completion
from . import whole
from .plan import (
    MAX_BATCH_CPU,
    PREFILL_TOKENS,
    Decoding,
    ExitRequest,
    Features,
    TokenRow,
    Wave,
    make_plan,
    make_rows,
    memory_limits,
)
from .sampling import choose, completion, generator_of

__all__ = [
    "MAX_BATCH_CPU",
    "Decoding",
    "ExitRequest",
    "Features",
    "TokenRow",
    "Wave",
    "answer_wave",
    "make_plan",
    "make_rows",
    "memory_limits",
    "perplexities",
]


LOGITS = 1 << 26
"""Most values of the logits of one forward pass that returns those of all tokens: a quarter of a gigabyte."""


class _Layer(DynamicLayer):
    """Keys and values in one buffer with room for the whole answer: a step writes one column and copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers, self.length = (keys, values), length
        self._view()

    def _view(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._view()
        return self.keys, self.values

    def select(self, rows: torch.Tensor) -> None:
        self.buffers = (self.buffers[0][rows], self.buffers[1][rows])
        self._view()


class _Batch:
    """The rows that are being decoded."""

    def __init__(self, vlm: Vlm, rows: list[TokenRow], prefixes: dict, decoding: Decoding):
        self.vlm, self.rows, self.decoding = vlm, rows, decoding
        self.heads = max(len(row.head) for row in rows)
        tails = max(len(row.tail) for row in rows)
        room = self.heads + tails + decoding.max_new_tokens
        device, dtype = vlm.device, vlm.model.dtype
        config = vlm.model.config.text_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(rows), config.num_key_value_heads, room, head_dim)
        layers = []
        for index in range(config.num_hidden_layers):
            buffers = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            for store, lines, positions in _by_store(rows, prefixes):
                for buffer, source in zip(buffers, store[index], strict=True):
                    n = min(source.shape[2], self.heads)  # what lies beyond a row's own head is masked
                    buffer[lines, :, self.heads - n : self.heads] = source[positions, :, source.shape[2] - n :]
            layers.append(_Layer(*buffers, self.heads))
        self.layers, self.cache = layers, Cache(layers=list(layers))
        self.mask = torch.zeros((len(rows), self.heads + tails), dtype=torch.long, device=device)
        ids = torch.full((len(rows), tails), vlm.tokenizer.pad_token_id or 0, device=device)
        for i, row in enumerate(rows):
            self.mask[i, self.heads - len(row.head) : self.heads] = 1
            self.mask[i, self.mask.shape[1] - len(row.tail) :] = 1
            ids[i, tails - len(row.tail) :] = torch.tensor(row.tail, device=device)
        self.ids = ids
        self.generators = [generator_of(row.request, decoding.seed) for row in rows] if decoding.temperature else []

    def step(self) -> torch.Tensor:
        """Runs the pending tokens; returns the next token of each row (B,)."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        logits = self.vlm.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return self.choose(logits.float())

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Next tokens (B,) from logits (B, V)."""
        return choose(logits, self.decoding, self.generators)

    def push(self, tokens: torch.Tensor) -> None:
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], dim=1)

    def compact(self, keep: list[int]) -> None:
        """Keeps the given rows."""
        index = torch.tensor(keep, device=self.vlm.device)
        for layer in self.layers:
            layer.select(index)
        self.mask, self.ids = self.mask[index], self.ids[index]
        self.generators = [self.generators[i] for i in keep] if self.generators else []


def _by_store(rows: list[TokenRow], prefixes: dict) -> list[tuple[list, list[int], list[int]]]:
    """(keys and values of a chunk, lines of the batch that read it, their rows there)."""
    found: dict[int, tuple[list, list[int], list[int]]] = {}
    for line, row in enumerate(rows):
        if row.head:
            store, position = prefixes[row.prefix]
            _, lines, positions = found.setdefault(id(store), (store, [], []))
            lines.append(line)
            positions.append(position)
    return list(found.values())


def _prefill(vlm: Vlm, chunk: list[tuple], features: Features) -> dict[tuple, tuple[list, int]]:
    """{prefix: (keys and values of the chunk, one pair a layer, (N, heads, T, head_dim); row)}, left-padded."""
    longest = max(len(head) for _, _, head in chunk)
    ids = torch.full((len(chunk), longest), vlm.tokenizer.pad_token_id or 0, device=vlm.device)
    mask = torch.zeros((len(chunk), longest), dtype=torch.long, device=vlm.device)
    for i, (_, _, head) in enumerate(chunk):
        ids[i, longest - len(head) :] = torch.tensor(head, device=vlm.device)
        mask[i, longest - len(head) :] = 1
    cache = vlm.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        **vlm.family.placed(vlm.model, [features(image, exit) for image, exit, _ in chunk]),
        use_cache=True,
        logits_to_keep=1,
    )[CACHE]
    store = [(layer.keys, layer.values) for layer in cache.layers]
    return {prefix: (store, i) for i, prefix in enumerate(chunk)}


@torch.inference_mode()
def answer_wave(
    vlm: Vlm,
    wave: Wave,
    features: Features,
    decoding: Decoding,
    skip: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, list[Completion]]]:
    """Yields (number of the batch, its completions in the order of the batch), batch by batch.

    Args:
        features: image features of a sample's image at an exit.
        skip: numbers of batches that are answered already.
    """
    todo = [i for i in range(len(wave.batches)) if i not in skip]
    if not vlm.shares_prefix:
        for i in todo:
            yield i, whole.answer_batch(vlm, wave.batches[i], features, decoding)
        return
    needed = {row.prefix for i in todo for row in wave.batches[i]}
    prefixes: dict[tuple, tuple[list, int]] = {}
    for chunk in wave.chunks:  # whole chunks or none: what a prefix was computed beside must not depend on `skip`
        if needed & set(chunk):
            prefixes |= _prefill(vlm, chunk, features)
    for i in todo:
        yield i, _decode(_Batch(vlm, wave.batches[i], prefixes, decoding))


def _decode(batch: _Batch) -> list[Completion]:
    """Decodes the batch to its end. Finished rows are removed once they are an eighth of the batch."""
    stop = batch.vlm.stop_ids
    tokens: list[list[int]] = [[] for _ in batch.rows]
    alive = list(range(len(batch.rows)))  # row of each line of the batch
    for step in range(batch.decoding.max_new_tokens):
        chosen = batch.step()
        for line, token in zip(alive, chosen.tolist(), strict=True):
            if not tokens[line] or tokens[line][-1] not in stop:
                tokens[line].append(token)
        going = [i for i, line in enumerate(alive) if tokens[line][-1] not in stop]
        if not going or step + 1 == batch.decoding.max_new_tokens:
            break
        batch.push(chosen)
        if len(alive) - len(going) >= max(1, len(alive) // 8):
            batch.compact(going)
            alive = [alive[i] for i in going]
    return [completion(batch.vlm, row, ids) for row, ids in zip(batch.rows, tokens, strict=True)]


@torch.inference_mode()
def perplexities(vlm: Vlm, texts: Sequence[str], max_tokens: int = 256) -> list[float | None]:
    """Perplexity of each text as an answer without image or question, under the language model.

    The text-only model is the reference: it is the same at every exit. exp(mean negative log-likelihood per token) over
    the first `max_tokens` tokens, 4 significant digits; None for a text without tokens.
    """
    tokenizer, vocabulary = vlm.tokenizer, vlm.model.config.get_text_config().vocab_size
    opening = tokenizer(vlm.chat("", with_image=False), add_special_tokens=False).input_ids[-2:]  # where answers begin
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:max_tokens] for text in texts]
    found: list[float | None] = [None] * len(texts)
    order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: (len(rows[i]), i))
    room = min(PREFILL_TOKENS, LOGITS // vocabulary)
    step = max(1, room // max((len(rows[i]) + len(opening) for i in order), default=1))
    for start in range(0, len(order), step):
        part = order[start : start + step]
        longest = max(len(rows[i]) for i in part)
        ids = torch.tensor([opening + rows[i] + [0] * (longest - len(rows[i])) for i in part], device=vlm.device)
        forwards = {name: torch.ones_like(ids) for name in vlm.family.forward_inputs}
        said = vlm.model(input_ids=ids, use_cache=False, **forwards).logits  # right padding: causal, no mask
        for line, i in enumerate(part):
            span = slice(len(opening) - 1, len(opening) - 1 + len(rows[i]))
            loss = torch.nn.functional.cross_entropy(said[line, span].float(), torch.tensor(rows[i], device=vlm.device))
            found[i] = float(f"{min(float(loss.exp()), 1e9):.4g}")
    return found
