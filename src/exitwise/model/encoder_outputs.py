"""Functions by family that get image features from the stock encoder and pass them to the language model.

Shapes: P rows of an image's features (image tokens for most families), H width of the language model, B rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

if TYPE_CHECKING:
    from .types import StockModel

Tensors = dict[str, torch.Tensor]
Keywords = dict[str, object]
"""Arguments of `forward` and `generate`."""


def stock_features(model: "StockModel", inputs: Tensors) -> list[torch.Tensor]:
    """One (P, H) per image or tile, the pooled output of `get_image_features`, which replaces the image tokens."""
    return list(model.get_image_features(**inputs).pooler_output)


def mllama_features(model: "StockModel", inputs: Tensors) -> list[torch.Tensor]:
    """One (tiles x patches, H) per image: the states that the cross-attention layers read."""
    inner = model.model
    states = inner.multi_modal_projector(inner.vision_model(**inputs).last_hidden_state)  # (N, 1, tiles, patches, H)
    return list(states.flatten(1, 3))


def llama4_features(model: "StockModel", inputs: Tensors) -> list[torch.Tensor]:
    """One (P, width of the encoder's adapter) per tile: the model projects them when it inserts them."""
    return list(model.get_image_features(**inputs).last_hidden_state)


def deepstack_features(model: "StockModel", inputs: Tensors) -> list[torch.Tensor]:
    """One (P, H x (1 + taps)) per image: the merged last state, then the states that each tap adds to a language layer.

    A tap of a block that does not run adds nothing: its columns are zero.
    """
    found = model.get_image_features(**inputs)
    taps = len(model.model.visual.deepstack_merger_list) - len(found.deepstack_features)
    none = [[torch.zeros_like(f) for f in found.pooler_output] for _ in range(taps)]
    columns = zip(found.pooler_output, *found.deepstack_features, *none, strict=True)
    return [torch.cat(parts, dim=-1) for parts in columns]


def listed(model: "StockModel", features: Sequence[torch.Tensor]) -> Keywords:
    """Features of the images of a batch, in order, as `generate` and `forward` take them: one tensor an image."""
    pooled = cast(torch.Tensor, list(features))  # typed as a tensor, and read as a list
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def flat(model: "StockModel", features: Sequence[torch.Tensor]) -> Keywords:
    """As `listed`, for families that take one tensor over all images."""
    pooled = torch.cat(list(features))
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def tiled(model: "StockModel", features: Sequence[torch.Tensor]) -> Keywords:
    """As `flat`, shaped (tiles, P of a tile, H) for smolvlm, some releases of which read P from the shape."""
    pooled = torch.cat(list(features)).unflatten(0, (-1, model.model.image_seq_len))
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def last_state(model: "StockModel", features: Sequence[torch.Tensor]) -> Keywords:
    """As `flat`, for llama4, which projects the last hidden state itself."""
    state = torch.cat(list(features))
    return {"mm_encoder_outputs": {"image": BaseModelOutput(last_hidden_state=state)}}


def deepstack(model: "StockModel", features: Sequence[torch.Tensor]) -> Keywords:
    """As `listed`, for qwen3_vl: splits the columns of `deepstack_features`."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    width = model.config.text_config.hidden_size
    parts = [feature.split(width, dim=-1) for feature in features]
    columns = [list(column) for column in zip(*parts, strict=True)]
    output = BaseModelOutputWithDeepstackFeatures(
        pooler_output=cast(torch.FloatTensor, columns[0]),
        deepstack_features=cast("list[torch.Tensor]", columns[1:]),
    )
    return {"mm_encoder_outputs": {"image": output}}


def cross_attention(model: "StockModel", features: Sequence[torch.Tensor]) -> Keywords:
    """States of mllama's cross-attention, (B, tiles x patches, H): one per row, zeros for a row without an image."""
    return {"cross_attention_states": torch.stack(list(features))}
