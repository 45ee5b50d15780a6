"""Reward models with a linear head on a language model's last hidden state.

`SharedReward` adds an adapter named "reward" and the head to a language model that is in memory anyway: policy,
reference and reward model are one backbone with different adapters switched on. `HeadReward` is the same head on a
backbone of its own.

The head reads the last token's hidden state (Stiennon et al. 2020, "Learning to summarize from human feedback"); the
score is (head(hidden) - shift) / scale, with the shift and scale that give the held-out answers of its training mean 0
and standard deviation 1. An affine map keeps the order of answers, and so every Bradley-Terry comparison.

Shapes: B answers, T tokens, D hidden.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..model.families import FAMILIES
from ..model.loading import first_line
from ..run.directory import read_json
from .adapters import ADAPTER, load_adapter, only_adapter
from .dialogue import DialogueTokenizer
from .protocol import micro_batches, require_finite

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def backbone_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """The module that maps token ids to hidden states: the language model of a VLM, a text model itself."""
    family = FAMILIES.get(model.config.model_type)
    return attrgetter(family.language_model)(model) if family else model


def last_hidden(backbone: "PreTrainedModel", rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """(B, D) float32 hidden states of each row's last token; rows are padded on the right and masked."""
    device, lengths = next(backbone.parameters()).device, torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    more = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    hidden = backbone(input_ids=ids.to(device), attention_mask=mask.to(device), **more).last_hidden_state  # (B, T, D)
    return hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)].float()


@dataclass(frozen=True)
class RewardRecipe:
    """reward.json: what is needed to load a trained reward model, beside its weights."""

    backbone: str
    """testbed, a folder or a hub id; "" where the folder holds the whole backbone (full training)."""
    kind: str
    """vlm or text."""
    chat_template: str
    parts: bool
    max_length: int
    shift: float = 0.0
    scale: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises UserError where reward.json is missing, broken or of another version."""
        row = read_json(folder / "reward.json", *cls.__dataclass_fields__)
        unknown = row.keys() - cls.__dataclass_fields__.keys()
        if unknown or not isinstance(row["scale"], float) or not row["scale"] > 0:
            raise UserError(f"{folder}/reward.json is not what `exitwise reward train` writes; train it again")
        return cls(**row)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def dialogues(self, tokenizer: "PreTrainedTokenizerBase") -> DialogueTokenizer:
        return DialogueTokenizer(tokenizer, self.chat_template, self.parts, self.max_length)


class HeadReward:
    """A linear head on the last token's hidden state of a backbone.

    Args:
        name: of the reward model, for messages and reports.
        backbone: maps token ids and mask to hidden states.
        head: (D,) weights.
        recipe: shift and scale.
        scope: context in which the backbone is used; switches the reward adapter on and off.
    """

    def __init__(
        self,
        name: str,
        backbone: "PreTrainedModel",
        head: torch.Tensor,
        dialogues: DialogueTokenizer,
        recipe: RewardRecipe,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.name, self.backbone, self.dialogues, self.recipe, self.scope = name, backbone, dialogues, recipe, scope
        self.head = head.float().to(next(backbone.parameters()).device)

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """See `RewardModel.scores`."""
        return (self.logits(prompts, answers) - self.recipe.shift) / self.recipe.scale

    def logits(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """See `LogitRewardModel.logits`."""
        rows = [self.dialogues.ids(p, a) for p, a in zip(prompts, answers, strict=True)]
        found = torch.zeros(len(rows))
        # no_grad, not inference_mode: a model may keep what it computes (rotary tables), and the policy trains on it.
        with self.scope(), torch.no_grad():
            for batch in micro_batches([len(row) for row in rows]):
                hidden = last_hidden(self.backbone, [rows[i] for i in batch], self.dialogues.pad_id)
                found[batch] = (hidden @ self.head).cpu()
        return require_finite(self.name, prompts, found)


class SharedReward(HeadReward):
    """A `HeadReward` on the policy's own backbone: its adapter is switched on only while it scores."""

    @classmethod
    def attach(
        cls, peft_model: "PeftModel", folder: str | Path, tokenizer: "PreTrainedTokenizerBase", name: str = ""
    ) -> Self:
        """Loads the reward adapter of `folder` beside the adapters of `peft_model`, frozen and switched off.

        Args:
            peft_model: a PeftModel over the same root model as in training (a VLM's whole model).
            folder: shipped, or made by `exitwise reward train` with LoRA.

        Raises:
            UserError: the folder holds no such reward model, or its weights do not fit.
        """
        folder = Path(folder)
        recipe = RewardRecipe.read(folder)
        if not recipe.backbone:
            raise UserError(f"{folder} was trained with --tuning full and shares no backbone; train it with lora")
        load_adapter(peft_model, folder)
        backbone = backbone_of(cast("PreTrainedModel", peft_model.get_base_model()))
        head, scope = load_head(folder, backbone.config.hidden_size), lambda: only_adapter(peft_model, ADAPTER)
        return cls(name or str(folder), backbone, head, recipe.dialogues(tokenizer), recipe, scope)


def load_head(folder: Path, width: int) -> torch.Tensor:
    """(D,) weights of head.safetensors; raises UserError where they are missing or D is not `width`."""
    try:
        head = load_file(folder / "head.safetensors")["weight"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}/head.safetensors cannot be read ({first_line(error)}); train it again") from error
    if head.shape != (width,):
        raise UserError(f"the head of {folder} has shape {tuple(head.shape)}; this backbone needs ({width},)")
    return head
