"""Renders a prompt and an answer as the token ids that a reward model reads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.preferences import turns
from ..model.vlm import Vlm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIALOGUE_TEMPLATE = (
    "{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}{{ m['content'] }}"
    "{% endfor %}{{ '\n\nAssistant:' }}"
)
"""HH-RLHF's dialogue format, for tokenizers without a chat template."""
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ ' ' }}{% endfor %}{{ 'ASSISTANT:' }}"
)
"""`families.PLAIN_PROMPT` for several turns and without an image, for VLMs without a chat template."""


@dataclass(frozen=True)
class DialogueTokenizer:
    """Turns a prompt and an answer into token ids, in the same form for training and for scoring.

    Attributes:
        chat_template: Jinja template of the messages, up to where the answer begins.
        parts: whether the template takes a message's content as a list of parts, as VLMs do.
        max_length: tokens; of a longer dialogue the end is kept.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str
    parts: bool
    max_length: int

    def text(self, prompt: str) -> str:
        """The conversation up to where the answer begins."""
        messages = [{"role": turn["role"], "content": self._content(turn["content"])} for turn in turns(prompt)]
        return str(
            self.tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]  # annotated for texts only, takes parts as well
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    def ids(self, prompt: str, answer: str) -> list[int]:
        """Token ids of the dialogue. An answer that ends with the end-of-text token counts as ended, others as cut.

        Other control tokens are read as text: a blank after their first character keeps an answer from forging a turn.
        """
        text, eos, bos = self.text(prompt), str(self.tokenizer.eos_token or ""), self.tokenizer.bos_token
        ended = bool(eos) and answer.endswith(eos)
        answer = self._escape(answer.removesuffix(eos) if ended else answer)
        if answer and not text[-1:].isspace():
            answer = " " + answer
        head = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(str(bos)))).input_ids
        tail = self.tokenizer(answer, add_special_tokens=False).input_ids
        return [*head, *tail, *([self.tokenizer.eos_token_id] if ended else [])][-self.max_length :]

    def _content(self, text: str) -> str | list[dict[str, str]]:
        text = self._escape(text)
        return [{"type": "text", "text": text}] if self.parts else text

    def _escape(self, text: str) -> str:
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    @property
    def pad_id(self) -> int:
        """Any id: padding is masked."""
        return self.tokenizer.pad_token_id or 0


def dialogues_of_vlm(vlm: Vlm, max_length: int) -> DialogueTokenizer:
    """With the VLM's own chat template, or the plain prompt for one without."""
    return DialogueTokenizer(vlm.tokenizer, vlm.processor.chat_template or PLAIN_TEMPLATE, True, max_length)


def dialogues_of_text(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> DialogueTokenizer:
    """With the tokenizer's own chat template, or HH-RLHF's dialogue format for one without."""
    return DialogueTokenizer(tokenizer, tokenizer.chat_template or DIALOGUE_TEMPLATE, False, max_length)
