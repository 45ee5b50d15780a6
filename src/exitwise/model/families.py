"""The table of model families: where the parts of a vision-language model are, and what an exit needs of each.

To add a family: one entry in FAMILIES and one tiny model in tests/families.py; tests/test_families.py says whether the
entry is right. docs/howto/add-family.md has the steps.

Shapes: P rows of an image's features (image tokens for most families), H width of the language model, B rows.
"""

import copy
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from ..errors import UserError

Tensors = dict[str, torch.Tensor]


def stock_features(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    """One (P, H) per image or tile, the pooled output of `get_image_features`: what takes the place of image tokens."""
    return list(model.get_image_features(**inputs).pooler_output)


def mllama_features(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    """One (tiles x patches, H) per image: the states that the cross-attention layers read."""
    inner = model.model
    states = inner.multi_modal_projector(inner.vision_model(**inputs).last_hidden_state)  # (N, 1, tiles, patches, H)
    return list(states.flatten(1, 3))


def llama4_features(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    """One (P, width of the encoder's adapter) per tile: the model projects them where it puts them in."""
    return list(model.get_image_features(**inputs).last_hidden_state)


def deepstack_features(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    """One (P, H x (1 + taps)) per image: the merged last state, beside it what each tap adds to a language layer.

    A tap of a block that does not run adds nothing: its columns are zero.
    """
    found = model.get_image_features(**inputs)
    taps = len(model.model.visual.deepstack_merger_list) - len(found.deepstack_features)
    none = [[torch.zeros_like(f) for f in found.pooler_output] for _ in range(taps)]
    columns = zip(found.pooler_output, *found.deepstack_features, *none, strict=True)
    return [torch.cat(parts, dim=-1) for parts in columns]


def listed(model: Any, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Features of the images of a batch, in order, as `generate` and `forward` take them: one tensor an image."""
    pooled: Any = list(features)
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def flat(model: Any, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The same for families that want one tensor over all images."""
    pooled: Any = torch.cat(list(features))
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def tiled(model: Any, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The same as (tiles, P of a tile, H) for smolvlm, some releases of which read P from the shape."""
    pooled: Any = torch.cat(list(features)).unflatten(0, (-1, model.model.image_seq_len))
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def last_state(model: Any, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The same for llama4, which projects the last hidden state itself."""
    state: Any = torch.cat(list(features))
    return {"mm_encoder_outputs": {"image": BaseModelOutput(last_hidden_state=state)}}


def deepstack(model: Any, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The same for qwen3_vl: the columns of `deepstack_features` taken apart again."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    width = model.config.text_config.hidden_size
    parts: Any = [feature.split(width, dim=-1) for feature in features]
    columns: Any = [list(column) for column in zip(*parts, strict=True)]
    output = BaseModelOutputWithDeepstackFeatures(pooler_output=columns[0], deepstack_features=columns[1:])
    return {"mm_encoder_outputs": {"image": output}}


def cross_attention(model: Any, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The states of mllama's cross-attention, (B, tiles x patches, H); one a row, zeros for a row without an image."""
    return {"cross_attention_states": torch.stack(list(features))}


def n_layers(config: Any) -> int:
    """Blocks of the image encoder that a model config describes."""
    vision = config.vision_config
    return vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers


def absolute(layer: int, n_blocks: int) -> int:
    """`vision_feature_layer` as a number of blocks run."""
    return layer if layer >= 0 else n_blocks + 1 + layer


def cut_by_depth(config: Any, exit: int) -> Any:
    """The config with `exit` blocks in its encoder, for families that take the encoder's last state."""
    config = copy.deepcopy(config)
    vision = config.vision_config
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", exit)
    if hasattr(vision, "stage_names"):  # DINOv2 counts its blocks there again, and a config that disagrees is not read
        again = {"stage_names", "out_features", "out_indices"}
        plain = {key: value for key, value in vision.to_dict().items() if key not in again}
        vision = config.vision_config = type(vision).from_dict(plain)
    if getattr(vision, "layer_types", None):
        vision.layer_types = vision.layer_types[:exit]
    return config


def cut_by_layer(config: Any, exit: int) -> Any | None:
    """The same for families with `vision_feature_layer`; transformers records no state where there is no block."""
    if exit == 0:
        return None
    total, layer = n_layers(config), config.vision_feature_layer
    config = cut_by_depth(config, exit)
    if isinstance(layer, int):
        config.vision_feature_layer = -1
    else:
        config.vision_feature_layer = [min(absolute(one, total), exit) for one in layer]
    return config


def cut_internvl(config: Any, exit: int) -> Any | None:
    """A last state taken as -1 is normalised, any other is not; the cut model keeps to what the whole one does."""
    cut = cut_by_layer(config, exit)
    if cut is not None and config.vision_feature_layer != -1:
        cut.vision_feature_layer = exit
    return cut


def cut_mllama(config: Any, exit: int) -> Any | None:
    """Blocks and, of the states that are concatenated, those above the exit replaced by the exit's own."""
    if exit == 0:
        return None
    config = cut_by_depth(config, exit)
    vision = config.vision_config
    vision.intermediate_layers_indices = [min(i, exit - 1) for i in vision.intermediate_layers_indices]
    return config


def cut_deepstack(config: Any, exit: int) -> Any:
    """Blocks, and the taps of blocks that are left."""
    config = cut_by_depth(config, exit)
    vision = config.vision_config
    vision.deepstack_visual_indexes = [i for i in vision.deepstack_visual_indexes if i < exit]
    return config


def cut_windows(config: Any, exit: int) -> Any:
    """Blocks, and of those with full attention the ones that are left."""
    config = cut_by_depth(config, exit)
    vision = config.vision_config
    vision.fullatt_block_indexes = [i for i in vision.fullatt_block_indexes if i < exit]
    return config


Setting = tuple[Any, str, Any]
"""(object, attribute, value) that holds while the encoder is cut."""


def no_settings(model: Any, exit: int) -> list[Setting]:
    return []


def last_layer(model: Any, exit: int) -> list[Setting]:
    """The last state is taken, which in a cut encoder is the exit's; a model that takes several keeps its list."""
    return [(model.config, "vision_feature_layer", -1)] if isinstance(model.config.vision_feature_layer, int) else []


def internvl_layer(model: Any, exit: int) -> list[Setting]:
    """-1 is normalised and L is not: what the model does at its default exit is done at every exit."""
    layer = model.config.vision_feature_layer
    return [] if layer == -1 else [(model.config, "vision_feature_layer", n_layers(model.config))]


def fewer_taps(model: Any, exit: int) -> list[Setting]:
    """Only blocks that run have a tap."""
    visual = model.model.visual
    return [(visual, "deepstack_visual_indexes", [i for i in visual.deepstack_visual_indexes if i < exit])]


def _lora(language_model: str, parts: str = "self_attn|mlp") -> str:
    return rf".*{language_model}\.layers\.\d+\.({parts})\.(q|k|v|o|gate|up|down)_proj"


PLAIN_PROMPT = "USER: {image}{text} ASSISTANT:"
"""LLaVA-1.5, for checkpoints that carry no chat template."""


class Family(NamedTuple):
    """What a `config.model_type` needs. Paths are attributes, from the `ForConditionalGeneration` model."""

    tower: str
    projector: str | None
    """None where the tower projects by itself."""
    language_model: str
    blocks: str | None = None
    """The ModuleList of blocks, from the tower; None: by the kind of encoder (ENCODERS)."""
    route: str = "prefix"
    """How answers are generated. "prefix": causal attention and one position a token, so that the part up to the image
    is computed once for all questions (engines/hf.py). "whole": every row whole, by the model's own `generate`
    (engines/whole.py), for position tables, masks or attention layers that depend on the image."""
    image_inputs: tuple[str, ...] = ("pixel_values",)
    """What the encoder takes of what the processor gives."""
    token_inputs: tuple[str, ...] = ()
    """What `generate` needs beside ids: one value a token, padded with 0."""
    forward_inputs: tuple[str, ...] = ()
    """What must be 1 at every token of a bare text for it to be read forwards only, as answers are."""
    grid_inputs: tuple[str, ...] = ()
    """The same, one row an image."""
    features: Callable[[Any, Tensors], list[torch.Tensor]] = stock_features
    placed: Callable[[Any, Sequence[torch.Tensor]], dict[str, Any]] = listed
    """Features of a batch as keywords of `forward` and `generate`."""
    settings: Callable[[Any, int], list[Setting]] = no_settings
    """What holds while the encoder is cut."""
    truncate: Callable[[Any, int], Any | None] = cut_by_depth
    """The config of the same model with fewer blocks; None where there is none."""
    lora_targets: str = _lora("language_model")
    """Never the encoder, whose projections have the same names; a plain list of names would adapt it too."""
    averages: bool = True
    """Whether an exit may be a set of layers whose states are averaged."""
    block_returns_tuple: bool = False
    image_in_every_row: bool = False
    """Features come one a row, as cross-attention states, not one an image."""
    projects_late: bool = False
    """Features are those before the projector: the model projects them where it puts them in."""
    counted: bool = False
    """An image is one token, repeated: prompts can be written from P alone."""
    plain: tuple[str, str] = (PLAIN_PROMPT.replace("{image}", "{image}\n"), PLAIN_PROMPT.replace("{image}", ""))
    """The chat of checkpoints without a template: with an image, and without."""


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


def family_of(config: Any) -> Family:
    """The table's entry for the config of a supported model; LLaVA with Pixtral's encoder has one of its own."""
    encoder = getattr(getattr(config, "vision_config", None), "model_type", None)
    return FAMILIES["pixtral" if (config.model_type, encoder) == ("llava", "pixtral") else config.model_type]


def check_family(name: str, config: Any) -> Family:
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


def find_blocks(model: Any) -> nn.ModuleList:
    """The L transformer blocks of a model's image encoder."""
    family = family_of(model.config)
    path = family.blocks or ENCODERS[model.config.vision_config.model_type]
    return attrgetter(path)(attrgetter(family.tower)(model))


def shares_prefix(model: Any) -> bool:
    """Whether a prompt's first part may be computed apart from the rest.

    Not where attention reaches back a limited number of places: rows of a shared batch are padded in the middle. Nor
    where layers lie on several devices.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:  # keys and values lie on several devices
        return False
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    limited = any(kind != "full_attention" for kind in kinds) if kinds else bool(getattr(text, "sliding_window", None))
    return family_of(model.config).route == "prefix" and not limited


def truncated_config(config: Any, exit: int) -> Any | None:
    """The config of the same model whose image encoder has `exit` blocks, by the family's native means.

    The model built from it gives at its default exit what the whole model gives at `exit`, with the same weights.
    None where transformers has no such model (exit 0 of families that take a recorded state).
    """
    return family_of(config).truncate(config, exit)
