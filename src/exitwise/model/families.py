"""The table of model families: the attribute paths of a model's parts, and how its encoder is run, fed and truncated.

To add a family: one entry in FAMILIES and one tiny model in tests/families.py; tests/model/test_families.py checks the
entry. docs/howto/add-family.md has the steps. Functions of the entries: encoder_outputs.py and truncation.py.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from .encoder_outputs import (
    Keywords,
    Tensors,
    cross_attention,
    deepstack,
    deepstack_features,
    flat,
    last_state,
    listed,
    llama4_features,
    mllama_features,
    stock_features,
    tiled,
)
from .truncation import (
    Setting,
    cut_by_depth,
    cut_by_layer,
    cut_deepstack,
    cut_internvl,
    cut_mllama,
    cut_windows,
    fewer_taps,
    internvl_layer,
    last_layer,
    no_settings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .types import StockModel


def _lora(language_model: str, parts: str = "self_attn|mlp") -> str:
    return rf".*{language_model}\.layers\.\d+\.({parts})\.(q|k|v|o|gate|up|down)_proj"


PLAIN_PROMPT = "USER: {image}{text} ASSISTANT:"
"""LLaVA-1.5, for checkpoints that carry no chat template."""


class Family(NamedTuple):
    """One model type: attribute paths of its parts, from the `ForConditionalGeneration` model, and functions."""

    tower: str
    projector: str | None
    """None where the tower includes the projection."""
    language_model: str
    blocks: str | None = None
    """Path of the ModuleList of blocks, from the tower; None: that of the encoder's type (ENCODERS)."""
    route: str = "prefix"
    """How answers are generated. "prefix": attention is causal and each token has one position, so the prompt up to the
    image is computed once for all questions (engines/prefix.py). "whole": each row by the model's own `generate`
    (engines/whole.py), where position tables, masks or attention layers depend on the image."""
    image_inputs: tuple[str, ...] = ("pixel_values",)
    """Outputs of the processor that the encoder takes."""
    token_inputs: tuple[str, ...] = ()
    """Outputs of the processor that `generate` takes besides ids: one value per token, padded with 0."""
    forward_inputs: tuple[str, ...] = ()
    """Inputs that are 1 at every token of a text without a prompt, so that attention is causal as in answers."""
    grid_inputs: tuple[str, ...] = ()
    """Outputs of the processor that `generate` takes besides ids: one row per image."""
    features: Callable[["StockModel", Tensors], list[torch.Tensor]] = stock_features
    placed: Callable[["StockModel", Sequence[torch.Tensor]], Keywords] = listed
    """Makes arguments of `forward` and `generate` from the features of a batch."""
    settings: Callable[["StockModel", int], list[Setting]] = no_settings
    """Attributes that are set while the encoder is cut at an exit."""
    truncate: Callable[["PreTrainedConfig", int], "PreTrainedConfig | None"] = cut_by_depth
    """Makes the config of the model with fewer blocks; None where transformers has no such model."""
    lora_targets: str = _lora("language_model")
    """Modules that LoRA adapts, as a regular expression: a list of names would match those of the encoder too."""
    averages: bool = True
    """Whether an exit may be a set of layers whose states are averaged."""
    block_returns_tuple: bool = False
    image_in_every_row: bool = False
    """Features are cross-attention states, one per row of a batch and not one per image."""
    projects_late: bool = False
    """Features are taken before the projector: the model projects them when it inserts them."""
    counted: bool = False
    """An image is one token repeated P times, so prompts depend on the image by P only."""
    plain: tuple[str, str] = (PLAIN_PROMPT.replace("{image}", "{image}\n"), PLAIN_PROMPT.replace("{image}", ""))
    """The prompt format of checkpoints without a chat template: with an image, and without."""


_LLAVA = Family(
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model",
    settings=last_layer,
    truncate=cut_by_layer,
)
_SIZED = _LLAVA._replace(image_inputs=("pixel_values", "image_sizes"))
_IDEFICS = Family(
    "model.vision_model",
    "model.connector",
    "model.text_model",
    blocks="encoder.layers",
    image_inputs=("pixel_values", "pixel_attention_mask"),
    placed=flat,
    lora_targets=_lora("text_model"),
)
_GEMMA = Family(
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model",
    route="whole",
    token_inputs=("token_type_ids",),
    placed=flat,
)
_QWEN = Family(
    "model.visual",
    None,
    "model.language_model",
    blocks="blocks",
    route="whole",
    image_inputs=("pixel_values", "image_grid_thw"),
    token_inputs=("mm_token_type_ids",),
    grid_inputs=("image_grid_thw",),
)
FAMILIES = {
    "llava": _LLAVA._replace(counted=True),
    "pixtral": _SIZED,
    "llava_next": _SIZED,
    "llava_onevision": _SIZED,
    "aya_vision": _LLAVA._replace(placed=flat),
    "internvl": _LLAVA._replace(blocks="encoder.layer", placed=flat, settings=internvl_layer, truncate=cut_internvl),
    "mistral3": _SIZED,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS._replace(placed=tiled),
    "paligemma": _GEMMA._replace(forward_inputs=("token_type_ids",), plain=("{image}{text}", "{bos}{text}\n")),
    "gemma3": _GEMMA,
    "gemma4": _GEMMA._replace(
        projector="model.embed_vision",
        blocks="encoder.layers",
        image_inputs=("pixel_values", "image_position_ids"),
        token_inputs=("mm_token_type_ids",),
        placed=listed,
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN._replace(truncate=cut_windows),
    "qwen3_vl": _QWEN._replace(
        features=deepstack_features, placed=deepstack, settings=fewer_taps, truncate=cut_deepstack, averages=False
    ),
    "llama4": Family(
        "vision_model",
        "multi_modal_projector",
        "language_model.model",
        blocks="model.layers",
        route="whole",
        features=llama4_features,
        placed=last_state,
        projects_late=True,
        lora_targets=_lora("language_model.model", "self_attn|feed_forward|feed_forward.shared_expert"),
        block_returns_tuple=True,
    ),
    "mllama": Family(
        "model.vision_model",
        "model.multi_modal_projector",
        "model.language_model",
        blocks="transformer.layers",
        route="whole",
        image_inputs=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        token_inputs=("cross_attention_mask",),
        features=mllama_features,
        placed=cross_attention,
        image_in_every_row=True,
        truncate=cut_mllama,
        lora_targets=_lora("language_model", "self_attn|cross_attn|mlp"),
        averages=False,
    ),
}
# Where the blocks are, from the tower, by `vision_config.model_type`, for families that take several kinds of encoder.
ENCODERS = {
    "clip_vision_model": "encoder.layers",
    "siglip_vision_model": "encoder.layers",
    "dinov2": "encoder.layer",
    "pixtral": "transformer.layers",
}


def family_of(config: "PreTrainedConfig") -> Family:
    """The table's entry for the config of a supported model; LLaVA with Pixtral's encoder has one of its own."""
    encoder = getattr(getattr(config, "vision_config", None), "model_type", None)
    return FAMILIES["pixtral" if (config.model_type, encoder) == ("llava", "pixtral") else config.model_type]


def check_family(name: str, config: "PreTrainedConfig") -> Family:
    """The table's entry for a config.

    Raises:
        UserError: the family or its image encoder is not in the tables.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{name} is a {config.model_type!r} model; supported families: {', '.join(sorted(FAMILIES))} "
            "(to add one, see FAMILIES in exitwise/model/families.py and docs/howto/add-family.md)"
        )
    family = family_of(config)
    encoder = getattr(getattr(config, "vision_config", None), "model_type", None)
    if family.blocks is None and encoder not in ENCODERS:
        raise UserError(f"{name} has a {encoder!r} image encoder; supported: {', '.join(sorted(ENCODERS))}")
    return family


def find_blocks(model: "StockModel") -> nn.ModuleList:
    """The L transformer blocks of a model's image encoder."""
    family = family_of(model.config)
    path = family.blocks or ENCODERS[model.config.vision_config.model_type]
    return attrgetter(path)(attrgetter(family.tower)(model))


def shares_prefix(model: "StockModel") -> bool:
    """Whether a prompt's first part may be computed apart from the rest.

    False for attention with a limited window, since rows of a shared batch are padded in the middle, and for layers on
    several devices.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return False
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    limited = any(kind != "full_attention" for kind in kinds) if kinds else bool(getattr(text, "sliding_window", None))
    return family_of(model.config).route == "prefix" and not limited


def truncated_config(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig | None":
    """The config of the same model with `exit` blocks in its image encoder.

    With the same weights, the default exit of the model built from it equals `exit` of the whole model. None where
    transformers has no such model (exit 0 of families that take a recorded state).
    """
    return family_of(config).truncate(config, exit)
