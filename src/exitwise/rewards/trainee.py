"""Loads the backbone of a reward training and adds what is trained: an adapter or all weights, and a linear head."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..model.families import FAMILIES
from ..model.loading import TEXT_MODEL, loading_errors
from ..model.quiet import quiet
from ..model.testbed import TESTBEDS
from .config import RewardConfig
from .dialogue import DialogueTokenizer, dialogues_of_text, dialogues_of_vlm
from .loading import load_text_backbone
from .models import RewardRecipe, backbone_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Backbone(NamedTuple):
    """A frozen model before training."""

    model: "PreTrainedModel"
    dialogues: DialogueTokenizer
    kind: str
    """vlm or text."""
    device: torch.device


@dataclass(frozen=True)
class Trainee:
    """A backbone with its trained parameters.

    Attributes:
        model: the root: a PeftModel (lora), or the VLM or text model itself (full).
        backbone: the language model in it.
        head: (D,) weights.
        weights: every trained tensor by name, the head among them.
    """

    model: "PeftModel | PreTrainedModel"
    backbone: "PreTrainedModel"
    head: torch.nn.Parameter
    dialogues: DialogueTokenizer
    recipe: RewardRecipe
    weights: dict[str, torch.nn.Parameter]

    @property
    def device(self) -> torch.device:
        return self.head.device


def load_backbone(config: RewardConfig) -> Backbone:
    """The backbone in float32, frozen."""
    from ..model.loading import load_vlm

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.backbone in TESTBEDS or is_vlm(config.backbone):
        vlm = load_vlm(config.backbone, dtype="float32", device=device)
        return Backbone(vlm.model, dialogues_of_vlm(vlm, config.max_length), "vlm", vlm.device)
    model, tokenizer = load_text_backbone(config.backbone, device)
    return Backbone(model, dialogues_of_text(tokenizer, config.max_length), "text", model.device)


def is_vlm(source: str) -> bool:
    """Whether the model's config is of a family in the table. Raises UserError where it cannot be read."""
    from transformers import AutoConfig

    with quiet(), loading_errors(source, TEXT_MODEL):
        return AutoConfig.from_pretrained(source, trust_remote_code=False).model_type in FAMILIES


def make_trainee(base: Backbone, config: RewardConfig) -> Trainee:
    """A new adapter (or all weights) and a head of zeros: before the first step every score is 0."""
    torch.manual_seed(config.seed)
    backbone = backbone_of(base.model)
    model: PeftModel | PreTrainedModel = base.model
    if config.tuning == "lora":
        model = _with_lora(base, config)
    else:
        backbone.requires_grad_(True)
    model.eval()
    head = torch.nn.Parameter(torch.zeros(backbone.config.hidden_size, device=base.device))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    source = "" if config.tuning == "full" else config.backbone
    recipe = RewardRecipe(source, base.kind, base.dialogues.chat_template, base.dialogues.parts, config.max_length)
    return Trainee(model, backbone, head, base.dialogues, recipe, {**weights, "head": head})


def _with_lora(base: Backbone, config: RewardConfig) -> "PeftModel":
    from peft import LoraConfig, get_peft_model

    targets = FAMILIES[base.model.config.model_type].lora_targets if base.kind == "vlm" else "all-linear"
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=targets)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.model, lora)
    model.peft_config["default"].base_model_name_or_path = config.backbone
    return model
