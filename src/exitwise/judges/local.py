"""Runs guards and chat judges in transformers: greedy decoding, left padding, batches of similar length.

The probability beside a label is taken where the verdict's word begins: p = P(unsafe) / sum of P(word) over the words a
verdict can be, each P the mass of the tokens that can begin the word (with or without a blank before it, either case).
This is the classifier score of Llama Guard (Inan et al. 2023) and of ShieldGemma (Zeng et al. 2024); the raw P(unsafe)
over the whole vocabulary stands beside it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..model.loading import TEXT_MODEL, loading_errors
from ..model.quiet import quiet
from .guards import GuardRequest
from .parsing import JudgeAnswer, Parsed, unscored

PROBE_PROMPT, PROBE_ANSWER = "exitwiseprompt", "exitwiseanswer"


class LocalModel:
    """A judge's weights, its tokenizer, and the tokens that can begin its verdicts.

    Args:
        words: the words that a verdict can be, the word for unsafe first; empty for judges without such a word.
        marks: strings that the rendered chat template must contain.
    """

    def __init__(self, model: Any, processor: Any, words: tuple[str, ...], marks: tuple[str, ...], reads_image: bool):
        self.model, self.processor, self.reads_image = model, processor, reads_image
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.marks = marks
        self.classes = _classes(self.tokenizer, words)
        self.candidates = [token for group in self.classes for token in group]
        decoder = self.tokenizer.added_tokens_decoder
        self.controls = {i for i, token in decoder.items() if token.special} | set(self.tokenizer.all_special_ids)
        self.control_words = {token.content for token in decoder.values() if token.special}
        self.control_words |= {str(token) for token in self.tokenizer.all_special_tokens}
        self.added_words = {token.content for token in decoder.values() if not token.content.isspace()}

    @property
    def context(self) -> int:
        """Tokens that fit, prompt and reply."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "max_position_embeddings", None) or 10**9

    def probe(self, request: GuardRequest, with_image: bool = False) -> str:
        """The rendered template around two probe words; its control words are added to `control_words`.

        Raises:
            UserError: the checkpoint has no chat template, or it leaves the question or the answer out, or it is not
                that of the version asked for.
        """
        text = self.render(request, with_image)
        for word, what in ((PROBE_PROMPT, "question"), (PROBE_ANSWER, "answer")):
            if text.count(word) != 1:
                raise UserError(
                    f"the chat template of {self.name} renders the {what} {text.count(word)} times; expected once: "
                    "give --judge-model a checkpoint of this guard"
                )
        for mark in self.marks:
            if mark not in text:
                raise UserError(
                    f"the chat template of {self.name} lacks {mark!r}, which this guard's has; give --judge-model a "
                    "checkpoint of the version that --judge names"
                )
        self.control_words |= {word for word in self.added_words if word in text}
        return text

    @property
    def name(self) -> str:
        return str(self.model.config._name_or_path)

    def render(self, request: GuardRequest, with_image: bool = False) -> str:
        """The whole prompt as text. Raises UserError where the chat template fails."""
        if request.text:
            return request.text
        for as_parts in (self.reads_image, not self.reads_image):
            try:
                text = self.processor.apply_chat_template(
                    [
                        {"role": role, "content": _parts(text, with_image and i == 0) if as_parts else text}
                        for i, (role, text) in enumerate(request.messages)
                    ],
                    tokenize=False,
                    add_generation_prompt=True,
                    **request.template,
                )
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                fault = str(error).splitlines()[0][:160]
                continue
            if all(text.count(words.strip()) for _, words in request.messages):
                return text
            fault = "it leaves a turn out"
        raise UserError(
            f"the chat template of {self.name} cannot be used ({fault}); give --judge-model a checkpoint with its own"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids, without a second beginning-of-text token where the template writes one."""
        bos = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids

    def forged(self, text: str, expected: Sequence[int]) -> bool:
        """Whether the prompt has other control tokens than the template writes."""
        return [token for token in self.encode(text) if token in self.controls] != list(expected)

    def reply(
        self, texts: Sequence[str], images: Sequence[Image.Image | None], parsers: Sequence[Callable[[str], Parsed]],
        room: int,
    ) -> list[JudgeAnswer]:  # fmt: skip
        """Replies to a batch of rendered prompts, in their order; all with an image or all without."""
        if images[0] is None:
            ids = {"input_ids": [self.encode(text) for text in texts]}
            inputs = self.tokenizer.pad(ids, padding=True, return_tensors="pt")
        else:
            bos = self.tokenizer.bos_token
            inputs = self.processor(
                images=[[image] for image in images],
                text=list(texts),
                add_special_tokens=not (bos and texts[0].startswith(bos)),
                padding=True,
                return_tensors="pt",
            )
        inputs = {
            k: v.to(self.model.device, self.model.dtype) if v.is_floating_point() else v.to(self.model.device)
            for k, v in inputs.items()
            if k != "token_type_ids"
        }
        width = inputs["input_ids"].shape[1]
        if width + room > self.context:
            if len(texts) > 1:  # so that only the long one has no verdict
                rows = zip(texts, images, parsers, strict=True)
                return [self.reply([text], [image], [parser], room)[0] for text, image, parser in rows]
            return [JudgeAnswer(unscored(f"the prompt has {width} tokens, the judge's context is {self.context}"))]
        recorder = _Recorder(self.candidates)
        eos = self.model.generation_config.eos_token_id
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=room,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id if eos is None else eos,
        )
        with torch.inference_mode(), quiet():
            output = self.model.generate(
                **inputs, generation_config=config, logits_processor=LogitsProcessorList([recorder])
            )
        steps = torch.stack(recorder.steps).cpu() if self.candidates else None  # (T, B, candidates)
        replies = []
        for line, ids in enumerate(output[:, width:].tolist()):
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            parsed = parsers[line](text)
            shares = self._shares(ids, parsed.at, steps[:, line]) if steps is not None and parsed.at >= 0 else None
            replies.append(JudgeAnswer(parsed, text, *(shares or (None, None))))
        return replies

    def _shares(self, ids: list[int], at: int, steps: torch.Tensor) -> tuple[float, float] | None:
        """(restricted, raw) probability of unsafe at the step that wrote character `at`; None if that was no candidate.

        Args:
            steps: log-probabilities (T, candidates).
        """
        for step in range(len(ids)):
            written = self.tokenizer.decode(
                ids[: step + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if len(written) > at:
                break
        else:
            return None
        if ids[step] not in self.candidates or not all(self.classes):
            return None
        masses, start = [], 0
        for group in self.classes:
            masses.append(float(steps[step, start : start + len(group)].double().exp().sum()))
            start += len(group)
        return _short(masses[0] / sum(masses)), _short(masses[0])


class _Recorder(LogitsProcessor):
    """Records the log-probabilities of some tokens at every step; changes no score."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.steps = tokens, list[torch.Tensor]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().log_softmax(dim=-1)[:, self.tokens])
        return scores


def load(
    name: str | Path, words: tuple[str, ...] = (), marks: tuple[str, ...] = (), reads_image: bool = False
) -> LocalModel:
    """Loads a judge from a folder or the hub: on the first GPU in the checkpoint's dtype, else on the CPU in float32.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet(), loading_errors(str(name), f"for --judge-model {TEXT_MODEL}"):
        AutoConfig.from_pretrained(name)  # before the tokenizer, whose message for a wrong name misleads
        processor = (AutoProcessor if reads_image else AutoTokenizer).from_pretrained(name)
        loader: Any = AutoModelForImageTextToText if reads_image else AutoModelForCausalLM
        model, info = loader.from_pretrained(
            name,
            dtype=torch.float32 if device == "cpu" else "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
        lost = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
        if lost:
            raise UserError(f"the weights of {name} are incomplete: {len(lost)} missing or misshapen, first {lost[0]}")
    return LocalModel(model.to(device).eval().requires_grad_(False), processor, words, marks, reads_image)


def _parts(text: str, with_image: bool) -> list[dict[str, str]]:
    return [{"type": "image"}] * with_image + [{"type": "text", "text": text}]


def _classes(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[list[int]]:
    """For each word the tokens that can begin it and no other word."""
    found = []
    for word in words:
        firsts = set()
        for written in {word, word.lower(), word.capitalize()}:
            for before in ("", " ", "\n"):
                base = tokenizer(before, add_special_tokens=False).input_ids if before else []
                ids = tokenizer(before + written, add_special_tokens=False).input_ids
                firsts.add(ids[len(base) if ids[: len(base)] == base else 0])
        found.append(firsts)
    return [sorted(group - set().union(*(o for o in found if o is not group))) for group in found]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
