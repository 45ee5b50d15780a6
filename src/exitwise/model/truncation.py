"""Encoders with fewer blocks, by family: the config of a truncated model, and the settings of a model that is cut."""

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .types import StockModel


def n_layers(config: "PreTrainedConfig") -> int:
    """Blocks of the image encoder that a model config describes."""
    vision = config.vision_config
    return vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers


def absolute(layer: int, n_blocks: int) -> int:
    """`vision_feature_layer` as a number of blocks run."""
    return layer if layer >= 0 else n_blocks + 1 + layer


def cut_by_depth(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig":
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


def cut_by_layer(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig | None":
    """As `cut_by_depth`, for families with `vision_feature_layer`; None at exit 0, where no state is recorded."""
    if exit == 0:
        return None
    total, layer = n_layers(config), config.vision_feature_layer
    config = cut_by_depth(config, exit)
    if isinstance(layer, int):
        config.vision_feature_layer = -1
    else:
        config.vision_feature_layer = [min(absolute(one, total), exit) for one in layer]
    return config


def cut_internvl(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig | None":
    """As `cut_by_layer`; layer -1 is normalised and others are not, so the cut model keeps the choice of the model."""
    cut = cut_by_layer(config, exit)
    if cut is not None and config.vision_feature_layer != -1:
        cut.vision_feature_layer = exit
    return cut


def cut_mllama(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig | None":
    """As `cut_by_depth`; concatenated states above the exit become that of the exit. None at exit 0."""
    if exit == 0:
        return None
    config = cut_by_depth(config, exit)
    vision = config.vision_config
    vision.intermediate_layers_indices = [min(i, exit - 1) for i in vision.intermediate_layers_indices]
    return config


def cut_deepstack(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig":
    """As `cut_by_depth`, with the taps of the blocks that are kept."""
    config = cut_by_depth(config, exit)
    vision = config.vision_config
    vision.deepstack_visual_indexes = [i for i in vision.deepstack_visual_indexes if i < exit]
    return config


def cut_windows(config: "PreTrainedConfig", exit: int) -> "PreTrainedConfig":
    """As `cut_by_depth`, with the full-attention blocks that are kept."""
    config = cut_by_depth(config, exit)
    vision = config.vision_config
    vision.fullatt_block_indexes = [i for i in vision.fullatt_block_indexes if i < exit]
    return config


Setting = tuple[object, str, object]
"""(object, attribute, value) to set while the encoder is cut."""


def no_settings(model: "StockModel", exit: int) -> list[Setting]:
    return []


def last_layer(model: "StockModel", exit: int) -> list[Setting]:
    """Takes the last state, which in a cut encoder is that of the exit; a model that takes several keeps its list."""
    return [(model.config, "vision_feature_layer", -1)] if isinstance(model.config.vision_feature_layer, int) else []


def internvl_layer(model: "StockModel", exit: int) -> list[Setting]:
    """Layer -1 is normalised and L is not: every exit is treated as the model treats its default exit."""
    layer = model.config.vision_feature_layer
    return [] if layer == -1 else [(model.config, "vision_feature_layer", n_layers(model.config))]


def fewer_taps(model: "StockModel", exit: int) -> list[Setting]:
    """Keeps the taps of blocks that run."""
    visual = model.model.visual
    return [(visual, "deepstack_visual_indexes", [i for i in visual.deepstack_visual_indexes if i < exit])]
