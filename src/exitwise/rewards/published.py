"""Published reward models: sequence classifiers with one label, from the hub or a folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..data.preferences import ASSISTANT, HUMAN
from ..errors import UserError
from ..model.loading import TEXT_MODEL, loading_errors
from ..model.quiet import quiet
from .protocol import micro_batches, require_finite

TEMPLATES: dict[str, Callable[[str, str], tuple[str, str]]] = {
    # The model card's own example: ("\n\nHuman: … \n\nAssistant:", "Sorry, …"), as two texts.
    "human-assistant": lambda prompt, answer: (f"{_opening(prompt)} {ASSISTANT}", answer),
    "question": lambda prompt, answer: (prompt, answer),
}
KNOWN = {
    "Ray2333/gpt2-large-harmless-reward_model": "human-assistant",
    "OpenAssistant/reward-model-deberta-v3-large-v2": "question",
}


def _opening(prompt: str) -> str:
    return prompt if prompt.startswith(HUMAN) else f"{HUMAN} {prompt}"


class PublishedReward:
    """A sequence classifier with one label; its score is logits[:, 0].

    Args:
        source: hub id or folder.
        template: one of TEMPLATES; without it, the one that KNOWN lists for the id, or for a folder of that name.

    Raises:
        UserError: it cannot be loaded, has several labels, or its template is not known.
    """

    def __init__(self, source: str | Path, template: str | None = None, device: str = "cpu"):
        self.name = str(source)
        self.template = TEMPLATES[choose_template(self.name, template)]
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with quiet(), loading_errors(self.name, TEXT_MODEL):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name, dtype=torch.float32, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        if info["missing_keys"]:
            raise UserError(
                f"{self.name} lacks {len(info['missing_keys'])} weights (first {min(info['missing_keys'])}); "
                "expected a trained reward model"
            )
        if model.config.num_labels != 1:
            raise UserError(f"{self.name} has {model.config.num_labels} labels; expected a reward model, which has one")
        self.tokenizer.padding_side, self.tokenizer.truncation_side = "right", "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id  # GPT-2 finds a row's last token by it
        self.model = model.to(device).eval().requires_grad_(False)
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        self.max_length = min(longest, self.tokenizer.model_max_length)

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """See `RewardModel.scores`."""
        return self.logits(prompts, answers)

    def logits(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) scores as published, without normalisation."""
        pairs = [self.template(p, a) for p, a in zip(prompts, answers, strict=True)]
        rows = [self.tokenizer(*pair, truncation=True, max_length=self.max_length) for pair in pairs]
        found = torch.zeros(len(rows))
        with torch.no_grad():
            for batch in micro_batches([len(row.input_ids) for row in rows]):
                inputs = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt").to(self.model.device)
                found[batch] = self.model(**inputs).logits[:, 0].float().cpu()
        return require_finite(self.name, prompts, found)


def choose_template(name: str, template: str | None) -> str:
    """The key in TEMPLATES for a hub id or folder. Raises UserError where it is unknown."""
    if template is None:
        parts = name.replace("--", "/").split("/")  # the hub's cache writes models--owner--name
        template = next((way for known, way in KNOWN.items() if known.split("/")[1] in parts), None)
    if template not in TEMPLATES:
        given = "is not known" if template is None else f"got the template {template!r}"
        raise UserError(
            f"the reward model {name} {given}; known: {', '.join(KNOWN)}; for another give --template (align: "
            f"--reward-template), one of {', '.join(TEMPLATES)}, or train one with `exitwise reward train`"
        )
    return template
