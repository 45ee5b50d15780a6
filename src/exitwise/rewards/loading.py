"""Loads a reward model by name: the shipped one, a trained folder, or a published classifier."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..model.loading import TEXT_MODEL, loading_errors
from ..model.quiet import quiet
from ..model.testbed import TESTBEDS
from ..model.vlm import Vlm
from .adapters import ADAPTER, with_idle_adapter
from .models import HeadReward, RewardRecipe, SharedReward, load_head
from .published import PublishedReward

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_reward(
    spec: str | Path,
    vlm: Vlm | None = None,
    peft_model: "PeftModel | None" = None,
    *,
    template: str | None = None,
    device: str = "auto",
) -> HeadReward | PublishedReward:
    """Loads a reward model by name.

    Args:
        spec: "builtin" (shipped, for the testbed), a folder made by `exitwise reward train`, or a hub id or folder of
            a published sequence classifier.
        vlm: shares its language model where the reward model was trained on the same one, by name or folder; for a
            reward model of another one, that other model is loaded.
        peft_model: over `vlm.model`, where the policy's adapter is there already.
        template: text format of a published one whose id is not known.
        device: of a model that shares no backbone; auto is the first GPU, else the CPU.

    Raises:
        UserError: it cannot be found or loaded, or does not fit `vlm`.
    """
    from ..model.loading import load_vlm

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(spec)
    if str(spec) == "builtin":
        from ..model.testbed.parts import shipped

        folder = shipped(ADAPTER)
        if vlm is not None and vlm.name not in TESTBEDS:
            raise UserError(f"the built-in reward model reads the testbed's hidden states, not those of {vlm.name}")
    if not (folder / "reward.json").is_file():
        return PublishedReward(spec, template, device)
    if template is not None:
        raise UserError(f"{spec} is not a published reward model and stores its own template; give no --template")
    recipe = RewardRecipe.read(folder)
    if recipe.kind == "vlm" and recipe.backbone:
        if vlm is None or Path(vlm.name).resolve() != Path(recipe.backbone).resolve():  # others read other states
            vlm, peft_model = load_vlm(recipe.backbone, device=device), None
        return SharedReward.attach(peft_model or with_idle_adapter(vlm.model, folder), folder, vlm.tokenizer, str(spec))
    return _own_backbone(str(spec), folder, recipe, device)


def _own_backbone(name: str, folder: Path, recipe: RewardRecipe, device: str) -> HeadReward:
    model, tokenizer = load_text_backbone(recipe.backbone or folder / "backbone", device)
    if recipe.backbone:
        return SharedReward.attach(with_idle_adapter(model, folder), folder, tokenizer, name)
    return HeadReward(name, model, load_head(folder, model.config.hidden_size), recipe.dialogues(tokenizer), recipe)


def load_text_backbone(source: str | Path, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """(model without a head, tokenizer) of a folder or hub id, in float32, frozen.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    from transformers import AutoModel, AutoTokenizer

    with quiet(), loading_errors(str(source), TEXT_MODEL):
        model, info = AutoModel.from_pretrained(str(source), dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    lost = [key for key in info["missing_keys"] if "pooler" not in key]
    if lost:
        raise UserError(f"the weights of {source} are incomplete: {len(lost)} missing, first {min(lost)}")
    return model.to(device).eval().requires_grad_(False), tokenizer
