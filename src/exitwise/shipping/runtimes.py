"""At which exit does a checkpoint run, and would another runtime stop elsewhere?

Read from configs and headers alone: no weights are loaded, no model is built.

What the runtimes do, read in their source:

- transformers builds `vision_config.num_hidden_layers` blocks and takes `hidden_states[vision_feature_layer]` where the
  family has that key. Blocks in the file beyond that number are ignored; blocks that the file lacks stay random.
- vLLM 0.32 (`model_executor/models/llava.py`, `_get_num_hidden_layers`) builds only the blocks up to that layer, for
  CLIP, SigLIP and Pixtral towers.
- llama.cpp runs LLaVA-type projectors through `tools/mtmd/models/llava.cpp`: the deepest of `clip.vision.feature_layer`
  where the file has that list, and `clip.vision.block_count - 1` otherwise. Files without the list come from converters
  that had left the last block out already (`tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py`), so one more is
  lost (its issue 25817). A `v.post_ln` in the file is applied, which LLaVA never does. Other projectors go through
  `build_vit` in `tools/mtmd/clip.cpp`, which runs all of `block_count`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.quiet import quiet

LLAVA_GRAPH = ("mlp", "ldp", "ldpv2")
"""Projector types that llama.cpp runs through its LLaVA graph and stops one block early without a feature layer."""

ADAPTER_GRAPH = ("adapter",)
"""The same graph, but all blocks."""

VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")
LLAMA_CPP_TOWERS = ("clip_vision_model", "siglip_vision_model")
TOWERS = r"(?:vision_tower|vision_model|visual|vision_encoder|vision_embed_tokens)"
# mllama's global encoder has layers of its own behind the blocks.
BLOCK = re.compile(rf"(?:^|\.){TOWERS}\.(?!global_transformer)(?:.*\.)?(?:layers|layer|blocks|resblocks)\.(\d+)\.")
GGUF_BLOCK = re.compile(r"v\.blk\.(\d+)\.")
MANY = "several layers"


@dataclass
class Inspection:
    """What was found.

    Attributes:
        kind: "huggingface" or "gguf".
        family: model type, or projector type of a GGUF file.
        blocks_told: blocks that the config or the metadata name.
        blocks_held: blocks whose weights are in the file.
        feature_layer: as it stands in the file; None where there is none.
        runs_at: exit by runtime; None where that runtime cannot run the file, or nothing tells.
        trained_at: the exit the checkpoint was made for, where that is known.
        source_blocks: blocks of the model it was cut from, where that is known.
        warnings: one sentence each; none means that all runtimes agree with what it was made for.
    """

    path: str
    kind: str
    family: str
    blocks_told: int | None
    blocks_held: int
    feature_layer: Any = None
    runs_at: dict[str, int | None] = field(default_factory=dict)
    trained_at: int | None = None
    source_blocks: int | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Looks at a Hugging Face folder or a GGUF file.

    Raises:
        UserError: it is neither, it is broken, or it has no image encoder.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            gguf = ", ".join(sorted(p.name for p in path.glob("*.gguf"))[:3])
            hint = (
                f"; give one of its GGUF files: {gguf}" if gguf else "; expected a Hugging Face folder or a GGUF file"
            )
            raise UserError(f"{path} has no config.json{hint}")
        return _inspect_folder(path)
    if not path.is_file():
        raise UserError(f"{path} is not there; expected a Hugging Face folder or a GGUF file")
    with open(path, "rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is no GGUF file (it begins with {magic!r}); expected one, or a Hugging Face folder")
    return _inspect_gguf(path)


def lines(found: Inspection) -> list[str]:
    """The findings for people, warnings last."""
    of = f"/{found.source_blocks}" if found.source_blocks else ""
    told = "not said" if found.blocks_told is None else found.blocks_told
    layer = "not said" if found.feature_layer is None else found.feature_layer
    out = [
        f"{found.path}: {'Hugging Face folder' if found.kind == 'huggingface' else 'GGUF'}, {found.family}",
        f"encoder blocks: {found.blocks_held} in the weights, {told} in the "
        f"{'config' if found.kind == 'huggingface' else 'metadata'}; feature layer: {layer}",
    ]
    for runtime, exit in found.runs_at.items():
        out.append(f"{runtime}: {'does not run it' if exit is None else f'exit {exit}{of}'}")
    if found.trained_at is not None:
        out.append(f"made for: exit {found.trained_at}{of}")
    return out + found.notes + [f"WARNING: {warning}" for warning in found.warnings]


def llama_cpp_exit(projector: str, block_count: int, feature_layers: Iterable[int]) -> int:
    """Blocks that llama.cpp runs, by the rule of its `tools/mtmd/models/llava.cpp`."""
    deepest = max(feature_layers, default=-1)
    if projector in (*LLAVA_GRAPH, *ADAPTER_GRAPH):
        if deepest >= 0:
            return deepest
        return block_count if projector in ADAPTER_GRAPH else block_count - 1
    return block_count


def _inspect_folder(path: Path) -> Inspection:
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a broken config makes transformers raise
        said = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise UserError(f"{path}: transformers cannot read config.json ({said}); restore it") from error
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise UserError(f"{path} is a {config.model_type!r} model without an image encoder; nothing to inspect")
    told = next((n for key in ("num_hidden_layers", "depth") if isinstance(n := getattr(vision, key, None), int)), None)
    blocks = _blocks(_weight_names(path), BLOCK)
    layer = getattr(config, "vision_feature_layer", None)
    tower = getattr(vision, "model_type", "unknown")
    found = Inspection(str(path), "huggingface", f"{config.model_type} ({tower})", told, len(blocks), layer)
    exit = told if layer is None else _index(layer, told)
    found.runs_at["transformers"] = exit
    if config.model_type == "llava":
        found.runs_at["vLLM"] = exit if tower in VLLM_TOWERS else None
        found.runs_at["llama.cpp, converted with feature_layer"] = exit if tower in LLAMA_CPP_TOWERS else None
        if exit is not None and tower in LLAMA_CPP_TOWERS:
            found.notes.append(
                "llama.cpp: convert with a converter that writes clip.vision.feature_layer; without it "
                f"{max(exit - 1, 0)} blocks run, one fewer"
            )
    if isinstance(layer, list | tuple):
        found.notes.append(f"features come from layers {', '.join(map(str, layer))}; the deepest is named")
    _check_blocks(found, blocks)
    _read_note(path, found)
    return found


def _inspect_gguf(path: Path) -> Inspection:
    fields, names = _read_gguf(path)
    if fields.get("general.architecture") != "clip":
        raise UserError(
            f"{path} holds a {fields.get('general.architecture')!r} model without an image encoder; "
            "give its mmproj file"
        )
    if not fields.get("clip.has_vision_encoder", True):
        raise UserError(
            f"{path} has no image encoder (clip.has_vision_encoder is false); give an mmproj file for images"
        )
    projector = fields.get("clip.vision.projector_type") or fields.get("clip.projector_type") or "mlp"
    told = fields.get("clip.vision.block_count")
    if not isinstance(told, int):
        raise UserError(f"{path} does not say clip.vision.block_count; llama.cpp would refuse it; convert again")
    layers = fields.get("clip.vision.feature_layer")
    if layers is not None and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise UserError(f"{path} says clip.vision.feature_layer = {layers!r}; expected a list of layers; convert again")
    blocks = _blocks(names, GGUF_BLOCK)
    found = Inspection(str(path), "gguf", f"mmproj ({projector})", told, len(blocks), layers)
    exit = llama_cpp_exit(projector, told, layers or ())
    found.runs_at["llama.cpp"] = exit if exit <= told else None
    if exit > told:
        found.warnings.append(f"feature layer {exit} is beyond the {told} blocks; llama.cpp refuses the file")
    in_graph = projector in LLAVA_GRAPH
    if in_graph and not layers:
        found.trained_at = told
        found.warnings.append(
            f"no clip.vision.feature_layer: llama.cpp runs {exit} of {told} blocks. Converters that leave the list out "
            f"have left out the blocks behind the features too, so the model was most likely trained at exit {told} "
            "(llama.cpp issue 25817). Convert again with the list."
        )
    if in_graph and any(name.startswith("v.post_ln.") for name in names):
        found.warnings.append(
            "the file has v.post_ln, which llama.cpp applies and LLaVA does not: features are others than in training"
        )
    if in_graph and "v.class_embd" in names:
        found.warnings.append(
            "the tower has a CLS token: llama.cpp puts it last where the model was trained with it first, so positions "
            "are off by one and the first patch gives way to CLS (docs/explanation/runtimes.md); features differ from "
            "transformers' at every exit"
        )
    _check_blocks(found, blocks)
    made_for = fields.get("exitwise.exit")
    if isinstance(made_for, int):
        found.trained_at, found.source_blocks = made_for, fields.get("exitwise.source_blocks")
        _compare(found)
    return found


def _read_gguf(path: Path) -> tuple[dict[str, Any], set[str]]:
    """(metadata, names of the tensors) of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: value.contents() for name, value in reader.fields.items()}
        return fields, {tensor.name for tensor in reader.tensors}
    except Exception as error:  # the reader trusts lengths and offsets; a cut file fails anywhere
        raise UserError(f"{path} is not a whole GGUF file ({type(error).__name__}: {error}); copy it again") from error


def _weight_names(path: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors files."""
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


def _blocks(names: Iterable[str], pattern: re.Pattern[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := pattern.search(name))}


def _index(layer: Any, n_blocks: int | None) -> int | None:
    """`vision_feature_layer` as an exit; the deepest of several."""
    if isinstance(layer, list | tuple):
        return max((i for each in layer if (i := _index(each, n_blocks)) is not None), default=None)
    if not isinstance(layer, int) or (layer < 0 and n_blocks is None):
        return None
    return layer if layer >= 0 else (n_blocks or 0) + 1 + layer


def _check_blocks(found: Inspection, blocks: set[int]) -> None:
    told = found.blocks_told
    if told is None:
        return
    if n_lacking := max(told, 0) - sum(block < told for block in blocks):
        first = next(block for block in range(told) if block not in blocks)
        what = "fills them with random numbers" if found.kind == "huggingface" else "cannot load it"
        runtime = "transformers" if found.kind == "huggingface" else "llama.cpp"
        found.warnings.append(f"{n_lacking} of {told} blocks have no weights (first: block {first}); {runtime} {what}")
    if extra := sorted(block for block in blocks if block >= told):
        found.warnings.append(f"the weights of block {extra[0]} and later are never run: only {told} blocks are built")
    for runtime, exit in found.runs_at.items():
        if exit is not None and not 0 <= exit <= told:
            found.warnings.append(f"{runtime}: exit {exit} is not there, the encoder has {told} blocks")


def _read_note(path: Path, found: Inspection) -> None:
    """The provenance that `exitwise slim` wrote, where there is one."""
    note_path = path / "exitwise.json"
    if not note_path.is_file():
        return
    try:
        note = json.loads(note_path.read_text(encoding="utf-8"))
        made_for, blocks = note["exit"], note["source_blocks"]
    except (ValueError, KeyError, TypeError):
        found.notes.append("exitwise.json is there but cannot be read")
        return
    found.trained_at, found.source_blocks = made_for, blocks
    default = note.get("source_default_exit")
    said = f"cut by {note.get('made_by')} from {note.get('source')}, whose default exit is {default}"
    found.notes.append(said + (f"; adapter {note['adapter']} merged" if note.get("adapter") else ""))
    _compare(found)


def _compare(found: Inspection) -> None:
    differing: Mapping[str, int | None] = {
        runtime: exit for runtime, exit in found.runs_at.items() if exit is not None and exit != found.trained_at
    }
    for runtime, exit in differing.items():
        found.warnings.append(
            f"{runtime} stops at exit {exit}, but the checkpoint was made for exit {found.trained_at}"
        )
