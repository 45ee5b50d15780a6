"""Fixtures of the reward tests: a random reward model, preference pairs, and a tiny text model."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from exitwise.data.preferences import Preference
from exitwise.rewards.dialogue import dialogues_of_vlm
from exitwise.rewards.models import RewardRecipe
from exitwise.run.directory import to_lines
from tests.conftest import tiny_llava, tiny_processor
from tests.reward_setup import QUESTIONS, TARGETS


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A reward folder for the tiny VLM, with random weights large enough to matter."""
    folder, vlm = tmp_path_factory.mktemp("reward"), tiny_llava()
    torch.manual_seed(1)
    model = get_peft_model(vlm.model, LoraConfig(r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    dialogues = dialogues_of_vlm(vlm, 128)
    save_file({"weight": torch.randn(32)}, folder / "head.safetensors")
    recipe = RewardRecipe(vlm.name, "vlm", dialogues.chat_template, dialogues.parts, 128, 0.5, 2.0)
    (folder / "reward.json").write_text(json.dumps(recipe.to_json()))
    return folder


@pytest.fixture
def policy():
    vlm = tiny_llava()
    torch.manual_seed(2)
    model = get_peft_model(vlm.model, LoraConfig(r=4, lora_dropout=0.5, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return vlm, model


@pytest.fixture
def pairs(tmp_path):
    """Learnable: what is preferred says yes."""
    rows = [Preference(q, f"yes {i}", f"no {i}", "ab"[i // 10 % 2]) for i, q in enumerate(QUESTIONS * 4)]
    (tmp_path / "pairs.jsonl").write_text(to_lines(rows))
    return str(tmp_path / "pairs.jsonl")


@pytest.fixture
def text_folder(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    tokenizer = tiny_processor().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    return tmp_path / "text"
