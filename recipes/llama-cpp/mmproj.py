"""Writes the mmproj file of a LLaVA checkpoint with a CLIP or SigLIP tower for llama.cpp, the exit included.

    python recipes/llama-cpp/mmproj.py FOLDER OUT.gguf

llama.cpp's own `convert_hf_to_gguf.py --mmproj` takes neither tower in LLaVA, and its legacy script rounds the
projector to float16. This one writes float32, only the blocks that run, and `clip.vision.feature_layer` beside
`clip.vision.block_count`: without the list llama.cpp stops one block early. The language model goes the official way.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import load_file

NAMES = (
    (r"^model\.", ""),
    (r"^vision_tower\.(vision_model\.)?", "v."),
    (r"^multi_modal_projector\.linear_1", "mm.0"),
    (r"^multi_modal_projector\.linear_2", "mm.2"),
    (r"embeddings\.class_embedding", "class_embd"),
    (r"embeddings\.patch_embedding", "patch_embd"),
    (r"embeddings\.position_embedding", "position_embd"),
    (r"pre_layrnorm", "pre_ln"),
    (r"encoder\.layers", "blk"),
    (r"self_attn\.(q|k|v|out)_proj", r"attn_\1"),
    (r"layer_norm(\d)", r"ln\1"),
    (r"mlp\.fc1", "ffn_up"),
    (r"mlp\.fc2", "ffn_down"),
)


def gguf_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def convert(folder: Path, out: Path, with_feature_layer: bool = True) -> int:
    """Writes `out` and returns the exit; without the list, what a careless converter writes."""
    config = json.loads((folder / "config.json").read_text())
    vision, layer = config["vision_config"], config["vision_feature_layer"]
    exit = layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    writer = GGUFWriter(out, "clip")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", vision["hidden_act"].startswith("gelu"))  # else the quick one
    writer.add_file_type(0)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in (
        ("image_size", vision["image_size"]),
        ("patch_size", vision["patch_size"]),
        ("embedding_length", vision["hidden_size"]),
        ("feed_forward_length", vision["intermediate_size"]),
        ("projection_dim", vision.get("projection_dim", 0)),
        ("attention.head_count", vision["num_attention_heads"]),
        ("block_count", exit),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", images["image_mean"])
    writer.add_array("clip.vision.image_std", images["image_std"])
    if with_feature_layer:
        writer.add_array("clip.vision.feature_layer", [exit])
    writer.add_uint32("exitwise.exit", exit)
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    for name, value in tensors.items():
        short = gguf_name(name)
        block = re.match(r"v\.blk\.(\d+)\.", short)
        if (
            not short.startswith(("v.", "mm."))
            or "post_layernorm" in short
            or short.startswith("v.head")
            or (block and int(block[1]) >= exit)
        ):
            continue
        writer.add_tensor(short, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exit


if __name__ == "__main__":
    print(f"exit {convert(Path(sys.argv[1]), Path(sys.argv[2]))}: {sys.argv[2]}")
