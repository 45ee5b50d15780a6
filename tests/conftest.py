"""Tiny random models on the real code path, offline, and where the shared benchmark files are."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from exitwise.model.testbed.parts import CHAT_TEMPLATE
from exitwise.model.vlm import Vlm, describe
from tests.environment import image_processor

ROOT = Path(__file__).parents[1]
PATCH, SIDE = 7, 28  # 16 image tokens
LONGEST = ("test_tour", "test_docs", "test_align_processes", "test_families", "test_resume", "test_learning")
"""Files that take longest, most first: begun first, they leave no process alone at the end (`make test` runs two)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order of all others stays."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def tiny_processor() -> LlavaProcessor:
    """A byte-level tokenizer (no training, no file) with the testbed's chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<image>"],
    )
    images = image_processor("CLIP")(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(tower: str = "clip", layers: int = 4, feature_layer: int = -2, seed: int = 0) -> Vlm:
    """LLaVA with random weights: `layers` encoder blocks of width 16, two language blocks of width 32."""
    torch.manual_seed(seed)
    processor = tiny_processor()
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    vision = CLIPVisionConfig(intermediate_size=32, **shape) if tower == "clip" else Dinov2Config(mlp_ratio=2, **shape)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
    )
    config.image_token_id = config.image_token_index
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # larger than the usual initialisation, so that answers depend on the image
        if parameter.dim() > 1:
            parameter.mul_(8)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return describe(f"tiny-{tower}", model, processor)


def pixels_of(vlm: Vlm, images: list[Image.Image]) -> torch.Tensor:
    """(N, 3, height, width), for families that take nothing else."""
    return torch.cat([vlm.picture(image).inputs["pixel_values"] for image in images])


@pytest.fixture(scope="session", params=["clip", "dinov2"])
def tiny(request) -> Vlm:
    return tiny_llava(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny LLaVA saved as any Hugging Face checkpoint is."""
    folder = tmp_path_factory.mktemp("tiny-llava")
    vlm = tiny_llava()
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image.Image]:
    from skimage import data

    return {name: Image.fromarray(getattr(data, name)()) for name in ("coffee", "chelsea", "astronaut")}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public benchmark files beside the checkout; tests that read them skip without."""
    folder = Path(os.environ.get("EXITWISE_SHARED_DATA", ROOT.parent / "shared/data"))
    if not folder.is_dir():
        assert "EXITWISE_SHARED_DATA" not in os.environ, f"EXITWISE_SHARED_DATA names {folder}, which is no folder"
        pytest.skip("no shared benchmark files beside the checkout (set EXITWISE_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def testbed() -> Vlm:
    """The built-in VLM; its parts are downloaded once."""
    from exitwise import load_vlm

    return load_vlm("testbed")
