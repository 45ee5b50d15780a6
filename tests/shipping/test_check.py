"""The check of a slim checkpoint against the full model, in every family; the card's entry for a model of the hub."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from exitwise import SlimConfig, UserError, exit_at, inspect_checkpoint, slim
from exitwise.model.families import find_blocks
from exitwise.run.typed import from_json
from exitwise.shipping.card import card
from exitwise.shipping.check import answers, compare, reload
from exitwise.shipping.note import Note
from exitwise.shipping.slim import save, save_model
from tests.families import TINY
from tests.model.test_loading import FAMILY_FOLDERS

QUESTION = "What is this?"


def test_the_check_sees_another_exit(tiny, tmp_path):
    with exit_at(tiny, 3):
        wanted = answers(tiny)
    for exit in (2, 3):
        (tmp_path / str(exit)).mkdir()
        save(tiny, exit, tmp_path / str(exit))
    assert compare(wanted, answers(reload(tmp_path / "3", tiny.device, 3))).tokens
    with pytest.raises(UserError, match="differs from the full model"):
        compare(wanted, answers(reload(tmp_path / "2", tiny.device, 2)))
    with pytest.raises(UserError, match="2 blocks and exit 2, not 3"):
        reload(tmp_path / "2", tiny.device, 3)


@pytest.mark.parametrize("family", TINY)
@torch.inference_mode()
def test_every_family_is_what_it_was_at_the_exit(family, tmp_path, pictures):
    """Saved, loaded by transformers, and held to `exit_at`: all keys in place, the same logits."""
    vlm = TINY[family]()
    picture = vlm.picture(pictures["coffee"])
    prompt = vlm.prompt(QUESTION, picture.layout)
    inputs = {**picture.inputs, **prompt.extras, "input_ids": torch.tensor([prompt.ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for exit in (1, 3, 4):
        folder = tmp_path / str(exit)
        save_model(vlm, exit, folder)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        model, info = loaded
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert len(find_blocks(model)) == exit
        with exit_at(vlm, exit):
            wanted = vlm.model(**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILY_FOLDERS)
def test_the_check_of_another_family(family, tmp_path):
    """Through the folder, its processor and `generate`, as users have it."""
    vlm = TINY[family]()
    vlm.model.save_pretrained(tmp_path / "full")
    vlm.processor.save_pretrained(tmp_path / "full")
    folder = slim(SlimConfig(str(tmp_path / "full"), 2, check=True), tmp_path / "slim")
    path = folder / "exitwise.json"
    note = from_json(json.loads(path.read_text()), Note, path, "")
    assert note.check
    assert note.check.tokens
    assert "base_model" not in card(note)  # a folder
    assert 'base_model: "owner/model"' in card(replace(note, source="owner/model"))
    assert inspect_checkpoint(folder).runs_at["transformers"] == 2
