"""Finds the exit at which transformers, vLLM and llama.cpp run a checkpoint, and warns where they differ.

The rules, from the source of the runtimes:

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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UserError
from .checkpoints import Layers, block_numbers, read_encoder_config, read_mmproj, weight_names

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


@dataclass
class Inspection:
    """The exits of one checkpoint, by runtime.

    Attributes:
        family: model type, or projector type of a GGUF file.
        blocks_in_config: blocks that the config or the metadata name; None where they name no number.
        blocks_in_weights: blocks whose weights are in the file.
        feature_layer: as it stands in the file, transformers' default where a config.json is silent; None where the
            family has no such key.
        runs_at: exit by runtime; None where that runtime cannot run the file, or its exit is not known.
        made_for: the exit the checkpoint was made for, where that is known.
        source_blocks: blocks of the model it was cut from, where that is known.
        warnings: one sentence each; none where all runtimes stop at the exit the checkpoint was made for.
    """

    path: str
    kind: Literal["huggingface", "gguf"]
    family: str
    blocks_in_config: int | None
    blocks_in_weights: int
    feature_layer: Layers = None
    runs_at: dict[str, int | None] = field(default_factory=dict)
    made_for: int | None = None
    source_blocks: int | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Inspects a Hugging Face folder or a GGUF file.

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
        raise UserError(f"{path} does not exist; expected a Hugging Face folder or a GGUF file")
    with open(path, "rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is no GGUF file (it begins with {magic!r}); expected one, or a Hugging Face folder")
    return _inspect_gguf(path)


def lines(found: Inspection) -> list[str]:
    """The inspection as lines of text, warnings last."""
    of = f"/{found.source_blocks}" if found.source_blocks else ""
    configured = "an unknown number" if found.blocks_in_config is None else found.blocks_in_config
    layer = "none" if found.feature_layer is None else found.feature_layer
    out = [
        f"{found.path}: {'Hugging Face folder' if found.kind == 'huggingface' else 'GGUF'}, {found.family}",
        f"encoder blocks: {found.blocks_in_weights} in the weights, {configured} in the "
        f"{'config' if found.kind == 'huggingface' else 'metadata'}; feature layer: {layer}",
    ]
    for runtime, exit in found.runs_at.items():
        out.append(f"{runtime}: {'does not run it' if exit is None else f'exit {exit}{of}'}")
    if found.made_for is not None:
        out.append(f"made for: exit {found.made_for}{of}")
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
    config = read_encoder_config(path)
    tower, layer = config.tower, config.feature_layer
    blocks = block_numbers(weight_names(path), BLOCK)
    family = f"{config.model_type} ({tower})"
    found = Inspection(str(path), "huggingface", family, config.n_blocks, len(blocks), layer)
    exit = config.n_blocks if layer is None else _exit_of(layer, config.n_blocks)
    found.runs_at["transformers"] = exit
    if config.model_type == "llava":
        found.runs_at["vLLM"] = exit if tower in VLLM_TOWERS else None
        found.runs_at["llama.cpp, converted with feature_layer"] = exit if tower in LLAMA_CPP_TOWERS else None
        if exit is not None and tower in LLAMA_CPP_TOWERS:
            found.notes.append(
                "llama.cpp: convert with a converter that writes clip.vision.feature_layer; without it "
                f"{max(exit - 1, 0)} blocks run, one fewer"
            )
    if isinstance(layer, list):
        found.notes.append(f"features come from layers {', '.join(map(str, layer))}; the exit is the deepest of them")
    _check_blocks(found, blocks)
    _read_note(path, found)
    return found


def _inspect_gguf(path: Path) -> Inspection:
    file = read_mmproj(path)
    blocks = block_numbers(file.tensors, GGUF_BLOCK)
    family = f"mmproj ({file.projector})"
    found = Inspection(str(path), "gguf", family, file.n_blocks, len(blocks), file.feature_layers)
    exit = llama_cpp_exit(file.projector, file.n_blocks, file.feature_layers or ())
    found.runs_at["llama.cpp"] = exit if exit <= file.n_blocks else None
    if exit > file.n_blocks:
        found.warnings.append(f"feature layer {exit} is beyond the {file.n_blocks} blocks; llama.cpp refuses the file")
    in_graph = file.projector in LLAVA_GRAPH
    if in_graph and not file.feature_layers:
        found.made_for = file.n_blocks
        found.warnings.append(
            f"no clip.vision.feature_layer: llama.cpp runs {exit} of {file.n_blocks} blocks. Converters that leave the "
            "list out have left out the blocks behind the features too, so the model was most likely trained at exit "
            f"{file.n_blocks} (llama.cpp issue 25817). Convert again with the list."
        )
    if in_graph and any(name.startswith("v.post_ln.") for name in file.tensors):
        found.warnings.append(
            "the file has v.post_ln, which llama.cpp applies and LLaVA does not: the features differ from those in "
            "training"
        )
    if in_graph and "v.class_embd" in file.tensors:
        found.warnings.append(
            "the tower has a CLS token: llama.cpp puts it last where the model was trained with it first, so positions "
            "are off by one and the first patch is replaced by CLS (docs/explanation/runtimes.md); features "
            "differ from transformers' at every exit"
        )
    _check_blocks(found, blocks)
    if file.made_for is not None:
        found.made_for, found.source_blocks = file.made_for, file.source_blocks
        _compare(found)
    return found


def _exit_of(layer: int | list[int], n_blocks: int | None) -> int | None:
    """`vision_feature_layer` as an exit, the deepest of several; None where it counts from an end that is not known."""
    if isinstance(layer, list):
        return max((exit for each in layer if (exit := _exit_of(each, n_blocks)) is not None), default=None)
    if layer >= 0:
        return layer
    return None if n_blocks is None else n_blocks + 1 + layer


def _check_blocks(found: Inspection, blocks: set[int]) -> None:
    configured = found.blocks_in_config
    if configured is None:
        return
    if n_lacking := max(configured, 0) - sum(block < configured for block in blocks):
        first = next(block for block in range(configured) if block not in blocks)
        what = "fills them with random numbers" if found.kind == "huggingface" else "cannot load it"
        runtime = "transformers" if found.kind == "huggingface" else "llama.cpp"
        found.warnings.append(
            f"{n_lacking} of {configured} blocks have no weights (first: block {first}); {runtime} {what}"
        )
    if extra := sorted(block for block in blocks if block >= configured):
        found.warnings.append(
            f"the weights of block {extra[0]} and later are never run: only {configured} blocks are built"
        )
    for runtime, exit in found.runs_at.items():
        if exit is not None and not 0 <= exit <= configured:
            found.warnings.append(f"{runtime}: exit {exit} does not exist, the encoder has {configured} blocks")


def _read_note(path: Path, found: Inspection) -> None:
    """Adds the provenance that `exitwise slim` wrote, where there is one."""
    note_path = path / "exitwise.json"
    if not note_path.is_file():
        return
    try:
        note = json.loads(note_path.read_text(encoding="utf-8"))
        made_for, blocks = note["exit"], note["source_blocks"]
    except (ValueError, KeyError, TypeError):
        found.notes.append("exitwise.json exists but cannot be read")
        return
    found.made_for, found.source_blocks = made_for, blocks
    default = note.get("source_default_exit")
    source = f"cut by {note.get('made_by')} from {note.get('source')}, whose default exit is {default}"
    found.notes.append(source + (f"; adapter {note['adapter']} merged" if note.get("adapter") else ""))
    _compare(found)


def _compare(found: Inspection) -> None:
    """Warns of every runtime that stops at another exit than the one the checkpoint was made for."""
    for runtime, exit in found.runs_at.items():
        if exit is not None and exit != found.made_for:
            found.warnings.append(
                f"{runtime} stops at exit {exit}, but the checkpoint was made for exit {found.made_for}"
            )
