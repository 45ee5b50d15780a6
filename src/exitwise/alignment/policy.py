"""The policy of alignment: a VLM with LoRA on its language model, a linear value head, and itself as the reference.

Encoder and projector stay out of it: image features come from outside (features.py), already at the exit in question,
in rollout, ratio, value and reference alike. The reference is the policy with its adapter off, so one language model
is in memory, whatever is computed.

A row is [head | tail | response], `head` ending with the last image token (engines/prefix.py). Rows of one image at one
exit have one head, so its keys and values are computed once, with gradient, and read by all of them: the same numbers
as row by row (a test holds them to that) at a fraction of the tokens, 576 of about 700 for LLaVA-1.5. Families whose
prompts cannot be taken apart have empty heads; the model's own forward computes their rows whole.

Shapes: B rows, T response tokens, N distinct heads, S tail and response tokens, D hidden, V vocabulary, P image tokens.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..engines.prefix import Features, TokenRow
from ..engines.whole import answered, batch_inputs
from ..errors import UserError
from ..model.compat import CACHE, checkpoint_activations
from ..model.vlm import Vlm

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Outputs(NamedTuple):
    logprobs: torch.Tensor  # (B, T) of the response tokens; 0 where there is none
    entropy: torch.Tensor  # (B, T) of the distributions they were drawn from, in nats; no gradient unless asked for
    values: torch.Tensor  # (B, T) zeros where the policy has no value head


class Policy(nn.Module):
    """Log-probabilities, entropies and values of responses at the exits of their rows.

    Attributes:
        peft_model: the whole VLM with the adapter "default" on its language model.
        value_head: D -> 1 on the language model's last hidden states, None where the method has no critic.
    """

    def __init__(
        self,
        vlm: Vlm,
        rank: int,
        lora_alpha: float,
        *,
        critic: bool,
        share_heads: bool = True,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        targets = vlm.family.lora_targets
        config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and transformers among themselves
            self.peft_model = get_peft_model(vlm.model, config)
        self.vlm = vlm
        hidden = vlm.model.config.text_config.hidden_size
        self.value_head = nn.Linear(hidden, 1, dtype=torch.float32, device=vlm.device) if critic else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)  # the first advantages are then plain rewards to go
            nn.init.zeros_(self.value_head.bias)
        self.share_heads = share_heads and not gradient_checkpointing  # checkpoints and caches exclude each other
        if gradient_checkpointing:
            checkpoint_activations(vlm.model)
            vlm.model.train()  # transformers checkpoints in training mode only; there is no dropout to wake up

    def trainable(self) -> dict[str, nn.Parameter]:
        """Adapter and value head by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(
        self,
        rows: Sequence[TokenRow],
        responses: torch.Tensor,
        mask: torch.Tensor,
        features: Features,
        *,
        reference: bool = False,
        entropy_gradient: bool = False,
    ) -> Outputs:
        """Outputs for B rows.

        Args:
            rows: head and tail of each row.
            responses: (B, T) token ids, right-padded.
            mask: (B, T) 1.0 on response tokens.
            features: image features of a row's image at its exit.
            reference: with the adapter off.
        """
        valid = mask.bool()
        with self.peft_model.disable_adapter() if reference else nullcontext():
            if self.vlm.shares_prefix:
                hidden = self._hidden(rows, responses, mask, features)  # (B, T, D): states that predict each token
                picked = hidden[valid]  # (M, D): logits only where there is something to score
                logits = self.vlm.model.lm_head(picked).float()
            else:
                picked, logits = self._whole(rows, responses, valid, features)
        normal = torch.log_softmax(logits, dim=-1)
        chosen = normal.gather(1, responses[valid][:, None])[:, 0]
        with nullcontext() if entropy_gradient else torch.no_grad():
            surprise = -(normal.exp() * normal).sum(dim=-1)
        spread = lambda flat: torch.zeros(mask.shape, device=mask.device).masked_scatter(valid, flat)
        values = (
            spread(self.value_head(picked.float())[:, 0]) if self.value_head is not None else torch.zeros_like(mask)
        )
        return Outputs(spread(chosen), spread(surprise), values)

    def _hidden(
        self, rows: Sequence[TokenRow], responses: torch.Tensor, mask: torch.Tensor, features: Features
    ) -> torch.Tensor:
        """(B, T, D): the state before each response token."""
        device = responses.device
        shared = self.share_heads and all(row.head for row in rows)
        stems = [row.tail if shared else row.head + row.tail for row in rows]
        lengths = mask.sum(dim=1).long().tolist()
        longest = max(len(stem) + n for stem, n in zip(stems, lengths, strict=True))
        pad = self.vlm.tokenizer.pad_token_id or 0
        # a sampled image token must not be read as an image slot
        clean = responses.masked_fill(responses == self.vlm.image_token_id, pad)
        ids = torch.full((len(rows), longest), pad, device=device)
        real = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
        for i, (stem, n) in enumerate(zip(stems, lengths, strict=True)):
            ids[i, : len(stem)] = torch.tensor(stem, device=device)
            ids[i, len(stem) : len(stem) + n] = clean[i, :n]
            real[i, : len(stem) + n] = 1
        cache = cached = None
        if shared:
            cache, before = self._heads(rows, features)  # (B, heads)
            cached = torch.cat([before, real], dim=1)
            positions = before.sum(dim=1, keepdim=True) + torch.arange(longest, device=device)
            pictures = {}
        else:
            positions = torch.arange(longest, device=device).expand(len(rows), -1)
            pictures = _pictures(self.vlm, [row for row in rows if row.head], features)
        states = self.vlm.model.model(
            input_ids=ids,
            attention_mask=real if cached is None else cached,
            position_ids=positions,
            **{CACHE: cache},
            use_cache=shared,
            **pictures,
        ).last_hidden_state  # (B, S, D)
        starts = torch.tensor([len(stem) - 1 for stem in stems], device=device)
        index = starts[:, None] + torch.arange(responses.shape[1], device=device)
        return states.gather(1, index.clamp(max=longest - 1)[..., None].expand(-1, -1, states.shape[-1]))

    def _whole(
        self, rows: Sequence[TokenRow], responses: torch.Tensor, valid: torch.Tensor, features: Features
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, D) states and (M, V) logits that predict the response tokens, every row computed whole by the model's own
        forward, left-padded: for families whose positions, masks or layers depend on the image."""
        lengths = valid.sum(dim=1).tolist()
        pad = self.vlm.tokenizer.pad_token_id or 0
        # a sampled image token must not be read as an image slot
        clean = responses.masked_fill(responses == self.vlm.image_token_id, pad)
        whole = [
            answered(self.vlm, row, clean[i, :n].tolist()) for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
        ]
        seen: list[torch.Tensor] = []
        head = self.vlm.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            kept = responses.shape[1] + 1
            inputs = batch_inputs(self.vlm, whole, features)
            logits = self.vlm.model(**inputs, use_cache=False, logits_to_keep=kept).logits  # (B, T + 1, V)
        finally:
            hook.remove()
        states = seen[-1][:, -kept:]
        row, token = valid.nonzero(as_tuple=True)
        place = kept - 1 - valid.sum(dim=1)[row] + token  # the last of the T + 1 predicts the token after the answer
        return states[row, place], logits[row, place].float()

    def _heads(self, rows: Sequence[TokenRow], features: Features) -> tuple[DynamicCache, torch.Tensor]:
        """Keys and values of every row's head, left-padded, each distinct head computed once; its mask."""
        number: dict[tuple, int] = {}
        index = torch.tensor([number.setdefault(row.prefix, len(number)) for row in rows], device=self.vlm.device)
        distinct = [rows[index.tolist().index(n)] for n in range(len(number))]
        longest = max(len(row.head) for row in distinct)
        ids = torch.full((len(distinct), longest), self.vlm.tokenizer.pad_token_id or 0, device=self.vlm.device)
        real = torch.zeros((len(distinct), longest), dtype=torch.long, device=self.vlm.device)
        for i, row in enumerate(distinct):
            ids[i, longest - len(row.head) :] = torch.tensor(row.head, device=self.vlm.device)
            real[i, longest - len(row.head) :] = 1
        filled = self.vlm.model.model(
            input_ids=ids,
            attention_mask=real,
            position_ids=(real.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
            **_pictures(self.vlm, distinct, features),
        )[CACHE]
        cache = DynamicCache()
        for number_of_layer, layer in enumerate(filled.layers):
            cache.update(layer.keys[index], layer.values[index], number_of_layer)
        return cache, real[index]

    @contextmanager
    def evaluating(self) -> Iterator[Vlm]:
        """The VLM ready to generate: caches on, gradient checkpointing asleep, and under FSDP2 every weight whole.

        Processes decode different numbers of steps, so none may wait for another's shards in the middle of it.
        """
        training, shards = self.vlm.model.training, _shards(self)
        self.vlm.model.eval()
        if shards:
            self.gather_weights()
        try:
            yield self.vlm
        finally:
            for module in shards:  # as accelerate sets them up: all but the root give their weights back after use
                module.set_reshard_after_forward(module is not self, recurse=False)
                module.reshard()
            self.vlm.model.train(training)

    def gather_weights(self) -> None:
        """Makes every sharded weight whole until `evaluating` ends; call it through FSDP2's forward hooks."""
        for module in _shards(self):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def _shards(policy: nn.Module) -> "list[FSDPModule]":
    """The parts of the policy that FSDP2 shards; none without it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def _pictures(vlm: Vlm, rows: Sequence[TokenRow], features: Features) -> dict[str, object]:
    """The image features of the rows, in their order, as the model takes them."""
    found = [features(row.request.sample.image, row.request.exit) for row in rows]
    return vlm.family.placed(vlm.model, found) if found else {}


class _NoEncoder(nn.Module):
    """Takes the place of encoder or projector, with the numbers that the model's forward reads from it."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.num_patches = getattr(part, "num_patches", None)  # mllama


def without_encoder(vlm: Vlm) -> Vlm:
    """A `Vlm` of the same language model without encoder and projector; only `mm_encoder_outputs` gives it images.

    The given `Vlm` is left as it is. Both hold the same weight tensors, so nothing is copied in memory; encoder and
    projector are freed with the given one. What is added to the result (an adapter, gradients) does not show in it.
    """
    paths = [vlm.family.tower] if vlm.family.projects_late else [vlm.family.tower, vlm.family.projector]
    parts = [attrgetter(path)(vlm.model) for path in paths if path]
    kept: dict[int, object] = {id(part): _NoEncoder(part) for part in parts}  # what a deep copy puts in their place
    kept |= {id(p): p if not p.requires_grad else nn.Parameter(p.detach(), False) for p in vlm.model.parameters()}
    return replace(vlm, model=copy.deepcopy(vlm.model, kept), blocks=nn.ModuleList())


def check_context(vlm: Vlm, rows: Sequence[TokenRow], max_new_tokens: int) -> None:
    """Raises UserError where the longest row with its answer exceeds the model's context."""
    longest = max(rows, key=lambda row: len(row.head) + len(row.tail))
    needed = len(longest.head) + len(longest.tail) + max_new_tokens
    context = getattr(vlm.model.config.text_config, "max_position_embeddings", None)
    if context and needed > context:
        raise UserError(
            f"the longest prompt ({longest.request.sample.id}) takes {needed} tokens with image and answer, the "
            f"model's context is {context}; shorten it or lower --max-new-tokens"
        )
