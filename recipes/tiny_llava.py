"""A LLaVA-1.5 in miniature for other runtimes: random weights, a CLIP or SigLIP tower, SmolLM2's tokenizer. Runs in
exitwise's environment.

    python recipes/tiny_llava.py /tmp/tiny-llava [clip | siglip]

Head sizes are ones that vLLM knows (32), the vocabulary is one whose tokenizer llama.cpp's converter knows, and the
weights are larger than usual, so that answers depend on the image and on the exit.
"""

import sys
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from exitwise.model.testbed.parts import CHAT_TEMPLATE, base_folder

SIDE, PATCH, BLOCKS = 56, 14, 6  # 16 image tokens


def tiny_llava(tower: str = "clip", seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Default exit 5 of 6."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_folder(print))
    clip = tower == "clip"
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    vision = CLIPVisionConfig(projection_dim=64, **shape) if clip else SiglipVisionConfig(**shape)
    select = "default" if clip else "full"  # SigLIP has no CLS token to leave out
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy=select,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    config.image_token_id = image_token
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=int(clip),
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


if __name__ == "__main__":
    out = Path(sys.argv[1])
    model, processor = tiny_llava(*sys.argv[2:])
    model.save_pretrained(out)
    processor.save_pretrained(out)
    print(f"model: {out}")
