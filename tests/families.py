"""A tiny random model and processor for every family: real classes, made from configs, offline.

Where a stock part cannot be had here: video processors need torchvision and are left out (no video is asked), and
llama4's image processor needs it too, so a CLIP one that adds the aspect ratio stands in. Pixtral's processor imports
its torchvision image processor; the PIL one takes that module's place.
"""

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from exitwise.model.testbed.parts import CHAT_TEMPLATE
from exitwise.model.vlm import Vlm, describe
from tests.environment import TORCHVISION, image_processor, not_here

if not TORCHVISION and "transformers.models.pixtral.processing_pixtral" not in sys.modules:
    from transformers.models.pixtral import image_processing_pil_pixtral

    sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
from transformers.models.pixtral.processing_pixtral import PixtralProcessor

SIDE, PATCH, BLOCKS = 28, 7, 4  # 16 patches
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SQUARE = {"height": SIDE, "width": SIDE}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
VIT = VISION | {"image_size": SIDE, "patch_size": PATCH}


def tokenizer(*specials: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """Byte-level, no training, no file; `named` become attributes as the processors look for them (image_token=...)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *dict.fromkeys((*specials, *named.values()))]
    whole = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(words + alphabet)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens([AddedToken(w, special=True) for w in words])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )


def text(cls: Any, vocabulary: int, **more: Any) -> Any:
    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return cls(**(shape | more))


def without_video(cls: Any, **parts: Any) -> Any:
    """The stock processor with only what it asks of its video processor when there is no video."""
    bare = type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda *_: None})
    video = SimpleNamespace(num_frames=1, fps=1, video_sampling={"fps": 1, "max_frames": 1}, size={"longest_edge": 1})
    return bare(video_processor=video, **parts)


def template(placeholder: str) -> str:
    return CHAT_TEMPLATE.replace("<image>", placeholder)


def built(name: str, model: Any, processor: Any, seed: int = 0) -> Vlm:
    """Weights larger than the usual initialisation, gates open, so that answers depend on the image."""
    generator = torch.Generator().manual_seed(seed)
    model = model.eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if "gate" in key and parameter.numel() == 1:
            parameter.fill_(0.7)
        elif "lambda_" in key:
            parameter.fill_(1.0)
        elif parameter.dim() > 1:
            fan = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
            scale = (
                (0.3 if "gemma" in name else 1.0) if "embed_tokens" in key else 1.5 * fan**-0.5
            )  # gemma scales by √H
            scale *= 4 if "embed_vision" in key or (name == "llama4" and "multi_modal_projector" in key) else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif "bias" in key or "embedding" in key or "newline" in key:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return describe(name, model, processor)


def llava(feature_layer: Any = -2) -> Vlm:
    words = tokenizer(image_token="<image>")
    image = image_processor("CLIP")(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = hf.LlavaProcessor(
        image_processor=image, tokenizer=words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT), text_config=text(hf.LlamaConfig, len(words)),
        image_token_index=words.image_token_id, vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return built("llava", hf.LlavaForConditionalGeneration(config), processor)


def pixtral() -> Vlm:
    """LLaVA with Pixtral's encoder, as mistral-community/pixtral-12b."""
    words = tokenizer("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")
    config = hf.LlavaConfig(
        vision_config=pixtral_encoder(), text_config=text(hf.MistralConfig, len(words), sliding_window=None),
        image_token_index=words.image_token_id, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return built("pixtral", hf.LlavaForConditionalGeneration(config), pixtral_processor(words, 1))


def pixtral_encoder() -> Any:
    return hf.PixtralVisionConfig(**(VIT | {"image_size": 2 * SIDE, "head_dim": 8}))


def pixtral_processor(words: Any, merge: int) -> Any:
    image = image_processor("Pixtral")(size={"longest_edge": 2 * SIDE}, patch_size={"height": PATCH, "width": PATCH})
    return PixtralProcessor(
        image_processor=image, tokenizer=words, patch_size=PATCH, spatial_merge_size=merge,
        chat_template=template("[IMG]"),
    )  # fmt: skip


def mistral3() -> Vlm:
    words = tokenizer("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")
    config = hf.Mistral3Config(
        vision_config=pixtral_encoder(), text_config=text(hf.MistralConfig, len(words), sliding_window=None),
        image_token_index=words.image_token_id, vision_feature_layer=-1, spatial_merge_size=2,
    )  # fmt: skip
    return built("mistral3", hf.Mistral3ForConditionalGeneration(config), pixtral_processor(words, 2))


def llava_next() -> Vlm:
    words = tokenizer(image_token="<image>")
    image = image_processor("LlavaNext")(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = hf.LlavaNextProcessor(
        image_processor=image, tokenizer=words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VIT), text_config=text(hf.LlamaConfig, len(words)),
        image_token_index=words.image_token_id, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return built("llava_next", hf.LlavaNextForConditionalGeneration(config), processor)


def llava_onevision() -> Vlm:
    words = tokenizer(image_token="<image>", video_token="<video>")
    image = image_processor("LlavaOnevision")(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = without_video(
        hf.LlavaOnevisionProcessor, image_processor=image, tokenizer=words, num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VIT), text_config=text(hf.Qwen2Config, len(words)),
        image_token_index=words.image_token_id, video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return built("llava_onevision", hf.LlavaOnevisionForConditionalGeneration(config), processor)


def aya_vision() -> Vlm:
    """Its language model has sliding windows: 12 tokens here, so that they matter."""
    words = tokenizer(
        "TILE", "TILE_GLOBAL", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<image>", image_token="<|IMG_PATCH|>"
    )
    image = image_processor("GotOcr2")(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = hf.AyaVisionProcessor(
        image_processor=image, tokenizer=words, patch_size=PATCH, img_size=SIDE, downsample_factor=2,
        chat_template=template("<image>"),
    )  # fmt: skip
    language = text(
        hf.Cohere2Config, len(words), sliding_window=12, layer_types=["sliding_attention", "full_attention"]
    )
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**VIT), text_config=language, downsample_factor=2,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )  # fmt: skip
    return built("aya_vision", hf.AyaVisionForConditionalGeneration(config), processor)


def internvl(feature_layer: int = -1) -> Vlm:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    image = image_processor("GotOcr2")(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = without_video(
        hf.InternVLProcessor, image_processor=image, tokenizer=words, image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )  # fmt: skip
    vision = hf.InternVLVisionConfig(**(VIT | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}))
    config = hf.InternVLConfig(
        tie_word_embeddings=False,
        vision_config=vision, text_config=text(hf.Qwen2Config, len(words)), downsample_ratio=0.5,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
        vision_feature_layer=feature_layer,
    )  # fmt: skip
    return built("internvl", hf.InternVLForConditionalGeneration(config), processor)


IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>")


def idefics3() -> Vlm:
    words = tokenizer(*IDEFICS_TOKENS, image_token="<image>")
    image = image_processor("Idefics3")(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = hf.Idefics3Processor(
        image_processor=image, tokenizer=words, image_seq_len=4, chat_template=template("<image>")
    )
    config = hf.Idefics3Config(  # type: ignore[call-arg]
        vision_config=hf.Idefics3VisionConfig(**VIT).to_dict(), text_config=text(hf.LlamaConfig, len(words)),
        scale_factor=2, image_token_id=words.image_token_id, pad_token_id=0,
    )  # fmt: skip
    return built("idefics3", hf.Idefics3ForConditionalGeneration(config), processor)


def smolvlm() -> Vlm:
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # only videos are numbered in words
    words = tokenizer(*IDEFICS_TOKENS, image_token="<image>")
    image = image_processor("SmolVLM")(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = without_video(
        hf.SmolVLMProcessor, image_processor=image, tokenizer=words, image_seq_len=4, chat_template=template("<image>")
    )
    config = hf.SmolVLMConfig(  # type: ignore[call-arg]
        vision_config=hf.SmolVLMVisionConfig(**VIT).to_dict(), text_config=text(hf.LlamaConfig, len(words)),
        scale_factor=2, image_token_id=words.image_token_id, pad_token_id=0,
    )  # fmt: skip
    return built("smolvlm", hf.SmolVLMForConditionalGeneration(config), processor)


def paligemma() -> Vlm:
    """No chat template, like the real ones: the processor puts the image first."""
    words = tokenizer(image_token="<image>")
    image = image_processor("Siglip")(size=SQUARE)
    image.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(image_processor=image, tokenizer=words)
    config = hf.PaliGemmaConfig(
        tie_word_embeddings=False,
        vision_config=hf.SiglipVisionConfig(**VIT), text_config=text(hf.GemmaConfig, len(words), head_dim=8),
        image_token_index=words.image_token_id, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return built("paligemma", hf.PaliGemmaForConditionalGeneration(config), processor)


def gemma3() -> Vlm:
    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    processor = hf.Gemma3Processor(
        image_processor=image_processor("Gemma3")(size=SQUARE), tokenizer=words, image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )  # fmt: skip
    language = text(
        hf.Gemma3TextConfig, len(words), head_dim=8, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = hf.Gemma3Config(
        tie_word_embeddings=False,
        vision_config=hf.SiglipVisionConfig(**VIT), text_config=language, mm_tokens_per_image=4,
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    return built("gemma3", hf.Gemma3ForConditionalGeneration(config), processor)


def gemma4() -> Vlm:
    words = tokenizer(
        "<|video|>", image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
        boa_token="<|audio>", eoa_token="<audio|>",
    )  # fmt: skip
    image = image_processor("Gemma4")(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    processor = without_video(
        hf.Gemma4Processor, feature_extractor=None, image_processor=image, tokenizer=words, image_seq_length=70,
        chat_template=template("<|image|>"),
    )  # fmt: skip
    vision = hf.Gemma4VisionConfig(
        **VISION, num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=1024
    )
    language = text(
        hf.Gemma4TextConfig, len(words), head_dim=8, global_head_dim=8, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
    )  # fmt: skip
    ids = words.convert_tokens_to_ids
    config = hf.Gemma4Config(
        tie_word_embeddings=False,
        vision_config=vision, text_config=language, audio_config=None, image_token_id=ids("<|image|>"),
        boi_token_id=ids("<|image>"), eoi_token_id=ids("<image|>"), video_token_id=ids("<|video|>"),
        audio_token_id=ids("<|audio|>"), boa_token_id=ids("<|audio>"), eoa_token_index=ids("<audio|>"),
    )  # fmt: skip
    return built("gemma4", hf.Gemma4ForConditionalGeneration(config), processor)


QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}


def qwen_parts(cls: Any) -> tuple[Any, Any, dict[str, int]]:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", **QWEN_TOKENS)
    image = image_processor("Qwen2VL")(patch_size=PATCH, merge_size=2, min_pixels=14 * 14, max_pixels=42 * 42)
    image.size = {"shortest_edge": 14 * 14, "longest_edge": 42 * 42}
    processor = without_video(
        cls, image_processor=image, tokenizer=words,
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    return words, processor, ids  # type: ignore[return-value]


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def qwen2_vl() -> Vlm:
    words, processor, ids = qwen_parts(hf.Qwen2VLProcessor)
    vision = {
        "depth": BLOCKS, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    language = text(dict, len(words), rope_parameters=ROPE)
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=language, **ids)
    return built("qwen2_vl", hf.Qwen2VLForConditionalGeneration(config), processor)


QWEN_VISION = {
    "depth": BLOCKS, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
    "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def qwen2_5_vl() -> Vlm:
    words, processor, ids = qwen_parts(hf.Qwen2_5_VLProcessor)
    vision = QWEN_VISION | {"window_size": 28, "fullatt_block_indexes": [1, 3]}
    language = text(dict, len(words), rope_parameters=ROPE)
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=language, **ids)
    return built("qwen2_5_vl", hf.Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen3_vl() -> Vlm:
    words, processor, ids = qwen_parts(hf.Qwen3VLProcessor)
    vision = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    language = text(dict, len(words), rope_parameters=ROPE | {"mrope_interleaved": True}, head_dim=8)
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=language, **ids)
    return built("qwen3_vl", hf.Qwen3VLForConditionalGeneration(config), processor)


class OneTile(image_processor("CLIP")):  # type: ignore[misc]
    """Llama4's image processor needs torchvision; this gives what it gives for an image of one tile."""

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(images, *args, **kwargs)
        found["aspect_ratios"] = torch.ones(len(found["pixel_values"]), 2, dtype=torch.long)
        return found


def llama4() -> Vlm:
    """Its language model attends within chunks: of 16 tokens here, so that they matter."""
    words = tokenizer(
        "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|patch|>",
        image_token="<|image|>",
    )  # fmt: skip
    processor = hf.Llama4Processor(
        image_processor=OneTile(size={"shortest_edge": SIDE}, crop_size=SQUARE), tokenizer=words, patch_size=PATCH,
        pixel_shuffle_ratio=0.5, chat_template=template("<|image|>"),
    )  # fmt: skip
    vision = hf.Llama4VisionConfig(
        **VIT, pixel_shuffle_ratio=0.5, projector_input_dim=16, projector_output_dim=16, vision_output_dim=16
    )
    vision.intermediate_size = 64  # the shuffled width of the adapter
    language = text(
        hf.Llama4TextConfig, len(words), head_dim=8, num_local_experts=2, intermediate_size_mlp=64,
        attention_chunk_size=16, no_rope_layers=[1, 0],
    )  # fmt: skip
    ids = words.convert_tokens_to_ids
    config = hf.Llama4Config(
        vision_config=vision, text_config=language, image_token_index=ids("<|patch|>"),
        boi_token_index=ids("<|image_start|>"), eoi_token_index=ids("<|image_end|>"),
    )  # fmt: skip
    return built("llama4", hf.Llama4ForConditionalGeneration(config), processor)


def mllama(global_layers: int = 1) -> Vlm:
    words = tokenizer("<|python_tag|>", image_token="<|image|>")
    processor = hf.MllamaProcessor(
        image_processor=image_processor("Mllama")(size=SQUARE, max_image_tiles=4), tokenizer=words,
        chat_template=template("<|image|>"),
    )  # fmt: skip
    vision = hf.MllamaVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS, num_global_layers=global_layers,
        attention_heads=2, image_size=SIDE, patch_size=PATCH, max_num_tiles=4, intermediate_layers_indices=[0, 2],
        vision_output_dim=48,
    )  # fmt: skip
    language = text(
        hf.MllamaTextConfig, len(words), num_hidden_layers=3, cross_attention_layers=[1],
    )  # fmt: skip
    config = hf.MllamaConfig(
        vision_config=vision, text_config=language, image_token_index=words.convert_tokens_to_ids("<|image|>")
    )
    return built("mllama", hf.MllamaForConditionalGeneration(config), processor)


def skipping(name: str, make: Callable[..., Vlm]) -> Callable[..., Vlm]:
    """The family's model, or a skipped test where this environment cannot have it."""

    @functools.wraps(make)
    def made(**change: Any) -> Vlm:
        if name in NOT_HERE:
            pytest.skip(f"{name}: {NOT_HERE[name]}")
        return make(**change)

    return made


NOT_HERE = not_here()
TINY: dict[str, Callable[..., Vlm]] = {
    make.__name__: skipping(make.__name__, make)
    for make in (
        llava, llava_next, mllama, llava_onevision, aya_vision, paligemma, gemma3, gemma4, idefics3, smolvlm, internvl,
        mistral3, pixtral, qwen2_vl, qwen2_5_vl, qwen3_vl, llama4,
    )
}  # fmt: skip
