"""Compares llama.cpp and transformers on a slim LLaVA, in one environment with exitwise and cyllama 0.2.18.

    python recipes/llama-cpp/parity.py SLIM_FOLDER TEXT.gguf [--tokens 16] [--out result.json]

TEXT.gguf is the language model, from llama.cpp's own converter (README.md beside this file). All in float32, on
pictures of the tower's size, so that nothing is resized. Compared are image features and greedy tokens:

- `features_apart`: llama.cpp against transformers;
- `features_apart_from_its_order`: llama.cpp against the same blocks run in torch with the order of tokens that
  llama.cpp gives a tower with a CLS token (tools/mtmd/models/llava.cpp: CLS behind the patches, position table from the
  first patch on; tools/mtmd/clip.cpp: rows from the second on are kept);
- `with_its_features`: tokens of transformers' language model, given llama.cpp's image features.
"""

import argparse
import importlib.util
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cyllama
import numpy as np
import torch
from cyllama.llama.llama_cpp import (
    LlamaBatch,
    LlamaContext,
    LlamaContextParams,
    LlamaModel,
    LlamaModelParams,
    MtmdBitmap,
    MtmdContext,
    MtmdContextParams,
    disable_logging,
    get_default_media_marker,
    llama_backend_init,
)
from mmproj import convert
from transformers import AutoModelForImageTextToText, AutoProcessor

import exitwise

HERE = Path(__file__).parent
spec: Any = importlib.util.spec_from_file_location("vllm_parity", HERE.parent / "vllm/parity.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)


class Model(LlamaModel):
    """The context of this version of cyllama asks for an attribute that its model lacks."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A text GGUF and an mmproj file in llama.cpp."""

    def __init__(self, text: Path, mmproj: Path):
        params = LlamaModelParams()
        params.n_gpu_layers = 0
        self.model = Model(str(text), params)
        vision = MtmdContextParams()
        vision.use_gpu, vision.n_threads, vision.warmup, vision.flash_attn_type = False, 1, False, 0
        self.vision = MtmdContext(str(mmproj), self.model, vision)

    def answer(self, prompt: str, picture, n_tokens: int) -> tuple[np.ndarray, list[int]]:
        """(image features (P, H), greedy tokens)."""
        text = prompt.replace("<image>", get_default_media_marker())
        bitmap = MtmdBitmap.create_image(*picture.size, picture.tobytes())
        chunks = self.vision.tokenize(text, [bitmap], False, True)
        (image,) = [chunk for chunk in chunks if int(chunk.type) == 1]
        if self.vision.encode_chunk(image):
            raise RuntimeError("llama.cpp could not encode the image")
        features = np.array(self.vision.get_output_embeddings(image.n_tokens, self.model.n_embd), dtype=np.float32)
        params = LlamaContextParams()
        params.n_ctx, params.n_threads, params.n_threads_batch, params.flash_attn_type = 512, 1, 1, 0
        params.type_k = params.type_v = 0  # float32
        context = LlamaContext(self.model, params)
        past = self.vision.eval_chunks(context, chunks, 0, 0, 512, True)
        tokens: list[int] = []
        stop = self.model.get_vocab().token_eos()
        while len(tokens) < n_tokens and (not tokens or tokens[-1] != stop):
            tokens.append(int(np.argmax(np.array(context.get_logits_ith(-1)))))
            batch = LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
            batch.add(tokens[-1], past, [0], True)
            context.decode(batch)
            past += 1
        return features.reshape(image.n_tokens, -1), tokens


@torch.inference_mode()
def in_llama_cpp_order(model, pixels: torch.Tensor) -> torch.Tensor:
    """(P, H): the same blocks and projector on llama.cpp's order of tokens."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    state = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    cls = getattr(tower.embeddings, "class_embedding", None)
    if cls is not None:
        state = torch.cat([state, cls.expand(1, 1, -1)], dim=1)
    state = state + tower.embeddings.position_embedding.weight
    if hasattr(tower, "pre_layrnorm"):
        state = tower.pre_layrnorm(state)
    for block in tower.encoder.layers:
        state = block(state, attention_mask=None)
        state = state[0] if isinstance(state, tuple) else state
    return model.model.multi_modal_projector(state[:, int(cls is not None) :])[0]


@torch.inference_mode()
def generate(model, processor, prompt: str, picture, n_tokens: int, features=None) -> tuple[torch.Tensor, list[int]]:
    """(image features (P, H), greedy tokens); other features may be put in place of the model's own."""
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    own = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    if features is None:
        said = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        return own, said[0, inputs["input_ids"].shape[1] :].tolist()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[inputs["input_ids"] == model.config.image_token_id] = torch.from_numpy(features)
    said = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=n_tokens, do_sample=False
    )
    return own, said[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    disable_logging()
    llama_backend_init()
    processor = AutoProcessor.from_pretrained(args.folder)
    model = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            "with feature_layer": (Path(scratch, "a.gguf"), True),
            "without feature_layer": (Path(scratch, "b.gguf"), False),
        }
        result: dict[str, Any] = {"exit": None, "tower": model.config.vision_config.model_type, "files": {}}
        result |= {"tokens": args.tokens, "versions": {name: version(name) for name in ("transformers", "torch")}}
        built = json.loads(Path(cyllama.__file__).with_name("build_config.json").read_text())["versions"]
        result["versions"]["llama.cpp"] = built["llama_cpp_version"]
        for name, (path, listed) in files.items():
            result["exit"] = convert(args.folder, path, listed)
            result["files"][name] = {
                "inspect_says_exit": exitwise.inspect_checkpoint(path).runs_at["llama.cpp"],
                "questions": compare(LlamaCpp(args.text, path), model, processor, args.tokens),
            }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["files"].items():
        rows = found["questions"]
        same = sum(row["llama.cpp"] == row["transformers"] for row in rows)
        fed = sum(row["llama.cpp"] == row["with_its_features"] for row in rows)
        apart, ordered = (max(row[k] for row in rows) for k in ("features_apart", "features_apart_from_its_order"))
        print(f"{name}: runs exit {found['inspect_says_exit']} by inspect; the same tokens in {same} of {len(rows)}")
        print(f"  features apart by up to {apart:.2g} from transformers', {ordered:.2g} from its own order in torch")
        print(f"  transformers' language model says the same on its features in {fed} of {len(rows)}")
    print(args.out)


def compare(llama_cpp: LlamaCpp, model, processor, n_tokens: int) -> list[dict[str, Any]]:
    rows = []
    for picture, question in zip(shared.pictures(), shared.QUESTIONS, strict=True):
        prompt = shared.prompt(processor, question)
        features, tokens = llama_cpp.answer(prompt, picture, n_tokens)
        wanted, said = generate(model, processor, prompt, picture, n_tokens)
        _, fed = generate(model, processor, prompt, picture, n_tokens, features)
        pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        ordered = in_llama_cpp_order(model, pixels)
        rows.append(
            {
                "question": question,
                "largest_feature": float(wanted.abs().max()),
                "features_apart": float(np.abs(features - wanted.numpy()).max()),
                "features_apart_from_its_order": float(np.abs(features - ordered.numpy()).max()),
                "transformers": said,
                "llama.cpp": tokens,
                "with_its_features": fed,
            }
        )
    return rows


if __name__ == "__main__":
    main()
