"""Reward models: one number for a question and its answer, higher for what people prefer.

Three kinds behind one protocol. `SharedReward` is an adapter named "reward" and a linear head on a language model that
is in memory anyway: policy, reference and reward are one backbone with different adapters switched on. `HeadReward` is
the same head on a backbone of its own. `PublishedReward` is a sequence classifier with one label from the hub.

The head reads the last token's hidden state (Stiennon et al. 2020, "Learning to summarize from human feedback"); the
score is (head(hidden) - shift) / scale, with the shift and scale that give the held-out answers of its training mean 0
and deviation 1. An affine map leaves the order of answers as it is, and so every Bradley-Terry comparison won or lost.

Shapes: B answers, T tokens, D hidden.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..data.preferences import ASSISTANT, HUMAN, turns
from ..errors import UserError
from ..model.quiet import quiet
from ..model.vlm import FAMILIES, TESTBEDS, Vlm
from ..run.directory import read_json

ADAPTER = "reward"
MAX_TOKENS = 4096
"""Of a micro-batch of scoring, padding included."""
DIALOGUE_TEMPLATE = (
    "{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}{{ m['content'] }}"
    "{% endfor %}{{ '\n\nAssistant:' }}"
)
# vlm.PLAIN_PROMPT for several turns and without an image.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ ' ' }}{% endfor %}{{ 'ASSISTANT:' }}"
)


class ScoreError(UserError):
    """A reward model gave a score that is no number; a training loop stops here and keeps its last good step."""

    def __init__(self, name: str, index: int, prompt: str, score: float):
        self.index = index
        super().__init__(
            f"the reward model {name} gave {score} for answer {index} (prompt {prompt[:60]!r}); expected finite "
            "scores; check its weights, or give it another dtype"
        )


class Reward(Protocol):
    """Scores answers."""

    name: str

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) float32 on the CPU, higher is better; row i reads prompts[i] and answers[i] and nothing else.

        Raises:
            ScoreError: a score is not finite.
        """
        ...


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log σ(chosen - rejected) over (B,) scores of pairs; Bradley and Terry 1952, Ouyang et al. 2022 eq. 1."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reader:
    """Turns a prompt and an answer into token ids, as the reward model saw them in training.

    Attributes:
        chat_template: Jinja, of the messages up to where the answer begins.
        parts: the template wants a message's content as a list of parts (VLMs do).
        max_length: tokens; of what is longer the end is kept.
    """

    tokenizer: Any
    chat_template: str
    parts: bool
    max_length: int

    def text(self, prompt: str) -> str:
        """The conversation up to where the answer begins."""
        messages: list[dict[str, Any]] = [{**turn, "content": self._disarm(turn["content"])} for turn in turns(prompt)]
        if self.parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    def ids(self, prompt: str, answer: str) -> list[int]:
        """An answer that ends with the tokenizer's end-of-text token is read as ended, any other as cut.

        Control tokens elsewhere are text: a space after their first character keeps an answer from forging a turn.
        """
        text, eos, bos = self.text(prompt), self.tokenizer.eos_token, self.tokenizer.bos_token
        ended = bool(eos) and answer.endswith(eos)
        answer = self._disarm(answer.removesuffix(eos) if ended else answer)
        if answer and not text[-1:].isspace():
            answer = " " + answer
        head = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
        tail = self.tokenizer(answer, add_special_tokens=False).input_ids
        return [*head, *tail, *([self.tokenizer.eos_token_id] if ended else [])][-self.max_length :]

    def _disarm(self, text: str) -> str:
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    @property
    def pad_id(self) -> int:
        """Any id: padding is masked."""
        return self.tokenizer.pad_token_id or 0


def reader_of_vlm(vlm: Vlm, max_length: int) -> Reader:
    return Reader(vlm.tokenizer, vlm.processor.chat_template or PLAIN_TEMPLATE, True, max_length)


def reader_of_text(tokenizer: Any, max_length: int) -> Reader:
    """Its own chat template, or HH-RLHF's dialogue format for a tokenizer that has none."""
    return Reader(tokenizer, tokenizer.chat_template or DIALOGUE_TEMPLATE, False, max_length)


def batches(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Indices in batches of like length: rows times longest row is at most `max_tokens`, or the batch has one row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------- a head on a backbone


def backbone_of(model: Any) -> Any:
    """The module that turns token ids into hidden states: the language model of a VLM, a text model itself."""
    family = FAMILIES.get(model.config.model_type)
    return attrgetter(family.language_model)(model) if family else model


def last_hidden(backbone: Any, rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """(B, D) float32 hidden states of each row's last token, right padded and masked."""
    device, lengths = next(backbone.parameters()).device, torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    more = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    hidden = backbone(input_ids=ids.to(device), attention_mask=mask.to(device), **more).last_hidden_state  # (B, T, D)
    return hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)].float()


@dataclass(frozen=True)
class Recipe:
    """reward.json: how a trained reward model is put together again."""

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class HeadReward:
    """A linear head on the last token's hidden state of a backbone.

    Args:
        name: of the reward model, for messages and reports.
        backbone: ids and mask to hidden states.
        head: (D,) weights.
        recipe: shift and scale.
        scope: entered while the backbone is used; switches the reward adapter on and off.
    """

    def __init__(
        self,
        name: str,
        backbone: Any,
        head: torch.Tensor,
        reader: Reader,
        recipe: Recipe,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.name, self.backbone, self.reader, self.recipe, self.scope = name, backbone, reader, recipe, scope
        self.head = head.float().to(next(backbone.parameters()).device)

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """See `Reward.scores`."""
        return (self.logits(prompts, answers) - self.recipe.shift) / self.recipe.scale

    def logits(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) scores before shift and scale: their differences are log odds under Bradley and Terry's model.

        Raises:
            ScoreError: one of them is not finite.
        """
        rows = [self.reader.ids(p, a) for p, a in zip(prompts, answers, strict=True)]
        found = torch.zeros(len(rows))
        # no_grad, not inference_mode: a model may keep what it computes (rotary tables), and the policy trains on it.
        with self.scope(), torch.no_grad():
            for batch in batches([len(row) for row in rows]):
                hidden = last_hidden(self.backbone, [rows[i] for i in batch], self.reader.pad_id)
                found[batch] = (hidden @ self.head).cpu()
        return require_finite(self.name, prompts, found)


def require_finite(name: str, prompts: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
    """The scores; raises ScoreError naming the first that is not finite."""
    for i in (~torch.isfinite(scores)).nonzero().flatten().tolist()[:1]:
        raise ScoreError(name, i, prompts[i], float(scores[i]))
    return scores


class SharedReward(HeadReward):
    """A `HeadReward` whose backbone also is the policy's: its adapter is on only while it scores."""

    @classmethod
    def attach(cls, peft_model: Any, folder: str | Path, tokenizer: Any, name: str = "") -> Self:
        """Loads the reward adapter of `folder` beside the adapters of `peft_model`, frozen and switched off.

        Args:
            peft_model: a PeftModel over the same root model as in training (a VLM's whole model).
            folder: shipped, or made by `exitwise reward train` with LoRA.

        Raises:
            UserError: the folder holds no such reward model, or its weights do not fit.
        """
        folder = Path(folder)
        recipe = Recipe.read(folder)
        if not recipe.backbone:
            raise UserError(f"{folder} was trained with --tuning full and shares no backbone; train it with lora")
        before = _Snapshot(peft_model)
        load_adapter(peft_model, folder)
        before.restore()
        backbone = backbone_of(peft_model.get_base_model())
        head = load_head(folder, backbone.config.hidden_size)
        reader = Reader(tokenizer, recipe.chat_template, recipe.parts, recipe.max_length)
        return cls(name or str(folder), backbone, head, reader, recipe, lambda: only_adapter(peft_model, ADAPTER))


class _Snapshot:
    """What PEFT changes when adapters are loaded or switched, and the way back."""

    def __init__(self, peft_model: Any):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in peft_model.modules() if isinstance(m, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise UserError("an adapter is merged into the model, so no other can be switched on; unmerge it first")
        self.model, self.active = peft_model, peft_model.active_adapter
        self.disabled = any(layer.disable_adapters for layer in layers)
        self.training = [m for m in peft_model.modules() if m.training]
        self.grads = [(p, p.requires_grad) for p in peft_model.parameters()]

    def restore(self) -> None:
        self.model.set_adapter(self.active)
        if self.disabled:
            self.model.base_model.disable_adapter_layers()
        for module in self.training:
            module.training = True
        for parameter, flag in self.grads:
            parameter.requires_grad_(flag)


@contextmanager
def only_adapter(peft_model: Any, name: str) -> Iterator[None]:
    """Within the block the model answers with this adapter alone, in evaluation mode.

    Afterwards everything is as before: active adapter, adapters switched off, training mode, and which parameters take
    gradients (PEFT's `set_adapter` gives them to whatever it switches to).
    """
    before = _Snapshot(peft_model)
    try:
        peft_model.base_model.enable_adapter_layers()
        peft_model.set_adapter(name, inference_mode=True)
        for module in before.training:
            module.training = False
        yield
    finally:
        before.restore()


def load_adapter(peft_model: Any, folder: Path) -> None:
    """Loads the adapter of `folder` as "reward"; raises UserError unless every weight finds its place."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ADAPTER in peft_model.peft_config and peft_model.active_adapter != ADAPTER:
                peft_model.delete_adapter(ADAPTER)
            result = peft_model.load_adapter(str(folder), ADAPTER)
        strange = [*result.missing_keys, *result.unexpected_keys]
        if strange:  # PEFT would go on with what it initialised
            raise ValueError(f"{len(strange)} of its tensors have no place here, first {strange[0]}")
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the reward adapter {folder} does not fit this model ({_first(error)})") from error


def load_head(folder: Path, width: int) -> torch.Tensor:
    """(D,) weights of head.safetensors; raises UserError where they are missing or of another width."""
    try:
        head = load_file(folder / "head.safetensors")["weight"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}/head.safetensors cannot be read ({_first(error)}); train it again") from error
    if head.shape != (width,):
        raise UserError(f"the head of {folder} has shape {tuple(head.shape)}; this backbone needs ({width},)")
    return head


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------------------------------------- published ones

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
        template: one of TEMPLATES; without it, what KNOWN says of the id, or of a folder named like it.

    Raises:
        UserError: it cannot be loaded, has several labels, or nothing says how it wants its texts.
    """

    def __init__(self, source: str | Path, template: str | None = None, device: str = "cpu"):
        self.name = str(source)
        self.template = TEMPLATES[_choose_template(self.name, template)]
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        loader: Any = AutoModelForSequenceClassification
        with quiet(), loading_errors(self.name):
            model, info = loader.from_pretrained(self.name, dtype=torch.float32, output_loading_info=True)
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
        """See `Reward.scores`."""
        return self.logits(prompts, answers)

    def logits(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(B,) as published, without normalisation."""
        pairs = [self.template(p, a) for p, a in zip(prompts, answers, strict=True)]
        rows = [self.tokenizer(*pair, truncation=True, max_length=self.max_length) for pair in pairs]
        found = torch.zeros(len(rows))
        with torch.no_grad():
            for batch in batches([len(row.input_ids) for row in rows]):
                inputs = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt").to(self.model.device)
                found[batch] = self.model(**inputs).logits[:, 0].float().cpu()
        return require_finite(self.name, prompts, found)


def _choose_template(name: str, template: str | None) -> str:
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


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turns what transformers raises for a model that cannot be had into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(
            f"cannot load {name!r} ({_first(error)}); expected a folder with config.json, model.safetensors and a "
            "tokenizer, or a hub id you may read (HF_TOKEN for gated ones)"
        ) from error


# ---------------------------------------------------------------------------------------------- any of them


def load_reward(
    spec: str | Path,
    vlm: Vlm | None = None,
    peft_model: Any = None,
    *,
    template: str | None = None,
    device: str = "auto",
) -> HeadReward | PublishedReward:
    """A reward model by name.

    Args:
        spec: "builtin" (shipped, for the testbed), a folder made by `exitwise reward train`, or a hub id or folder of
            a published sequence classifier.
        vlm: shares its language model where the reward model was trained on the same one, by name or folder; a reward
            model of another one brings that along.
        peft_model: over `vlm.model`, where the policy's adapter is there already.
        template: how a published one wants its texts, where its id is not known.
        device: for a model of its own; auto is the first GPU where there is one.

    Raises:
        UserError: it cannot be found or loaded, or does not fit `vlm`.
    """
    from ..model.vlm import load_vlm

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
        raise UserError(f"{spec} is no published reward model: it knows how it wants its texts; give no template")
    recipe = Recipe.read(folder)
    if recipe.kind == "vlm" and recipe.backbone:
        if vlm is None or Path(vlm.name).resolve() != Path(recipe.backbone).resolve():  # others read other states
            vlm, peft_model = load_vlm(recipe.backbone, device=device), None
        return SharedReward.attach(peft_model or _bare(vlm.model, folder), folder, vlm.tokenizer, str(spec))
    return _own_backbone(str(spec), folder, recipe, device)


def _bare(model: Any, folder: Path) -> Any:
    """A PeftModel with the reward adapter as its only one, switched off, so that `model` answers as before."""
    from peft import PeftConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("the model has adapters already; give load_reward its peft_model, which holds them")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)), adapter_name=ADAPTER)
    peft_model.base_model.disable_adapter_layers()
    return peft_model.eval().requires_grad_(False)


def _own_backbone(name: str, folder: Path, recipe: Recipe, device: str) -> HeadReward:
    model, tokenizer = load_text_backbone(recipe.backbone or folder / "backbone")
    model = model.to(device).eval().requires_grad_(False)
    reader = Reader(tokenizer, recipe.chat_template, recipe.parts, recipe.max_length)
    if recipe.backbone:
        return SharedReward.attach(_bare(model, folder), folder, tokenizer, name)
    return HeadReward(name, model, load_head(folder, model.config.hidden_size), reader, recipe)


def load_text_backbone(source: str | Path) -> tuple[Any, Any]:
    """(model without a head, tokenizer) of a folder or hub id, float32 on the CPU.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    from transformers import AutoModel, AutoTokenizer

    loader: Any = AutoModel
    with quiet(), loading_errors(str(source)):
        model, info = loader.from_pretrained(str(source), dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    lost = [key for key in info["missing_keys"] if "pooler" not in key]
    if lost:
        raise UserError(f"the weights of {source} are not whole: {len(lost)} missing, first {min(lost)}")
    return model.eval(), tokenizer


def deviation(scores: torch.Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of (B,) scores; a deviation of 0 becomes 1, as there is nothing to scale."""
    spread = float(scores.double().std(correction=0))
    return float(scores.double().mean()), spread if math.isfinite(spread) and spread > 0 else 1.0
