"""Reads configs, headers and tensor names of checkpoints without loading weights or importing torch."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from ..errors import UserError

Layers = int | list[int] | None
"""`vision_feature_layer`: one layer, several, or none."""


class EncoderConfig(NamedTuple):
    """What a config.json says of the image encoder, transformers' defaults filled in.

    Attributes:
        n_blocks: blocks that transformers builds; None where the config does not give the number.
        feature_layer: None in families without that key, which take the encoder's last state.
    """

    model_type: str
    tower: str
    n_blocks: int | None
    feature_layer: Layers


class FamilyDefaults(NamedTuple):
    """What transformers assumes where a config.json of this type is silent."""

    tower: str
    n_blocks: int
    """Without any `vision_config`."""
    feature_layer: int | None = None


FAMILY_DEFAULTS = {
    "llava": FamilyDefaults("clip_vision_model", 24, -2),
    "llava_next": FamilyDefaults("clip_vision_model", 24, -2),
    "llava_onevision": FamilyDefaults("siglip_vision_model", 26, -1),
    "aya_vision": FamilyDefaults("siglip_vision_model", 26, -1),
    "internvl": FamilyDefaults("internvl_vision", 24, -1),
    "mistral3": FamilyDefaults("pixtral", 24, -1),
    "idefics3": FamilyDefaults("idefics3_vision", 12),
    "smolvlm": FamilyDefaults("smolvlm_vision", 12),
    "paligemma": FamilyDefaults("siglip_vision_model", 27),
    "gemma3": FamilyDefaults("siglip_vision_model", 12),
    "gemma4": FamilyDefaults("gemma4_vision", 16),
    "qwen2_vl": FamilyDefaults("qwen2_vl_vision", 32),
    "qwen2_5_vl": FamilyDefaults("qwen2_5_vl_vision", 32),
    "qwen3_vl": FamilyDefaults("qwen3_vl_vision", 27),
    "llama4": FamilyDefaults("llama4_vision_model", 34),
    "mllama": FamilyDefaults("mllama_vision_model", 32),
}
TOWER_BLOCKS = {"clip_vision_model": 12, "siglip_vision_model": 12, "dinov2": 12, "pixtral": 24}
"""Blocks where a `vision_config` is there without the number; other towers have that of their family."""


def read_encoder_config(path: Path) -> EncoderConfig:
    """The encoder that a Hugging Face folder's config.json describes.

    Raises:
        UserError: the file is broken, or the model has no image encoder.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read config.json ({error}); restore it") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}: config.json names no model_type; restore it")
    model_type = config["model_type"]
    default = FAMILY_DEFAULTS.get(model_type)
    vision = config.get("vision_config")
    if vision is None and default and model_type != "gemma4":  # gemma4 without one has no encoder
        vision = {"num_hidden_layers": default.n_blocks}
    if not isinstance(vision, dict):
        raise UserError(f"{path} is a {model_type!r} model without an image encoder; nothing to inspect")
    tower = vision.get("model_type") or (default.tower if default else "unknown")
    known = TOWER_BLOCKS.get(tower, default.n_blocks if default else None)
    n_blocks = next((vision[key] for key in ("num_hidden_layers", "depth") if key in vision), known)
    if n_blocks is not None and not isinstance(n_blocks, int):
        raise UserError(f"{path}: cannot read config.json (the number of blocks is {n_blocks!r}); restore it")
    layer = config.get("vision_feature_layer", default.feature_layer if default else None)
    if not (layer is None or isinstance(layer, int) or _are_layers(layer)):
        raise UserError(f"{path}: cannot read config.json (vision_feature_layer is {layer!r}); restore it")
    return EncoderConfig(model_type, tower, n_blocks, cast(Layers, layer))


def _are_layers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(layer, int) for layer in value)


def weight_names(path: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors files.

    Raises:
        UserError: a file is missing or broken.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no .safetensors file; expected the weights beside config.json")
    index, names = path / "model.safetensors.index.json", set()
    for file in files:
        try:
            with safe_open(file, "np") as handle:
                names |= set(handle.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}); copy it again") from error
    if index.exists():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is broken ({error}); copy it again") from error
        if missing := sorted(wanted - {file.name for file in files}):
            raise UserError(f"{path} lacks {', '.join(missing)}, which its index names; copy it again")
    return names


class Mmproj(NamedTuple):
    """What an mmproj file (GGUF, the image encoder for llama.cpp) says of itself."""

    projector: str
    n_blocks: int
    feature_layers: list[int] | None
    """`clip.vision.feature_layer`; None where the list is missing."""
    tensors: set[str]
    made_for: int | None
    """Exit that our converter wrote (recipes/llama-cpp)."""
    source_blocks: int | None


def read_mmproj(path: Path) -> Mmproj:
    """Metadata and tensor names of an mmproj file.

    Raises:
        UserError: the file is not whole, holds another kind of model, or lacks the number of blocks.
    """
    fields, tensors = _read_gguf(path)
    if fields.get("general.architecture") != "clip":
        raise UserError(
            f"{path} holds a {fields.get('general.architecture')!r} model without an image encoder; "
            "give its mmproj file"
        )
    if not fields.get("clip.has_vision_encoder", True):
        raise UserError(
            f"{path} has no image encoder (clip.has_vision_encoder is false); give an mmproj file for images"
        )
    n_blocks, layers = fields.get("clip.vision.block_count"), fields.get("clip.vision.feature_layer")
    if not isinstance(n_blocks, int):
        raise UserError(f"{path} lacks clip.vision.block_count; llama.cpp would refuse it; convert again")
    if layers is not None and not _are_layers(layers):
        raise UserError(f"{path} says clip.vision.feature_layer = {layers!r}; expected a list of layers; convert again")
    projector = fields.get("clip.vision.projector_type") or fields.get("clip.projector_type") or "mlp"
    made_for, source_blocks = fields.get("exitwise.exit"), fields.get("exitwise.source_blocks")
    return Mmproj(
        str(projector),
        n_blocks,
        cast(list[int] | None, layers),
        tensors,
        made_for if isinstance(made_for, int) else None,
        source_blocks if isinstance(source_blocks, int) else None,
    )


def _read_gguf(path: Path) -> tuple[Mapping[str, object], set[str]]:
    """(metadata, names of the tensors) of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: value.contents() for name, value in reader.fields.items()}
        return fields, {tensor.name for tensor in reader.tensors}
    except Exception as error:  # the reader trusts lengths and offsets; a cut file fails anywhere
        raise UserError(f"{path} is not a whole GGUF file ({type(error).__name__}: {error}); copy it again") from error


def block_numbers(names: Iterable[str], pattern: re.Pattern[str]) -> set[int]:
    """The numbers of the blocks that have tensors."""
    return {int(match[1]) for name in names if (match := pattern.search(name))}
