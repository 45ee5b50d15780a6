"""`Vlm`: a loaded vision-language model with the names of its parts; it prepares images and prompts, and answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, cast

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import nn

from ..errors import UserError
from ..run.exit import Exit
from .exit_names import parse_exits
from .exits import exit_at
from .families import Family, check_family, family_of, find_blocks, shares_prefix
from .processing import Layout, Picture, Prompt, as_image, drop_pixels, recorded
from .truncation import absolute

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.processing_utils import ProcessorMixin

    from .types import StockModel, StockProcessor, StockTokenizer


@dataclass(frozen=True)
class Vlm:
    """A loaded model with the names of its parts.

    Attributes:
        name: as the user gave it.
        blocks: the L transformer blocks of the image encoder.
        default_exit: number of blocks that run before the features which the model was trained with.
        adapter: the PEFT adapter that `load_vlm` was given, None for none.
    """

    name: str
    model: "StockModel"
    processor: "StockProcessor"
    blocks: nn.ModuleList
    default_exit: int
    adapter: str | None = None

    def __repr__(self) -> str:
        kind = self.model.config.model_type
        return f"Vlm({self.name}, {kind}, {self.n_blocks} blocks, default exit {self.default_exit}, {self.device})"

    def answer(
        self,
        image: Image.Image | str | PathLike[str] | None,
        prompt: str,
        exits: str | Sequence[Exit | int] = "default",
        max_new_tokens: int = 32,
    ) -> dict[Exit, str]:
        """{exit: the answer alone}, greedy: token for token what an audit of these exits writes.

        Args:
            image: a PIL image, the path of one, a name that prompt files take ("photo:coffee"), or None for none.
            exits: as the option `--exits`, or numbers.
            max_new_tokens: longest answer in tokens.

        Raises:
            UserError: an exit does not exist, the image cannot be read, or the prompt has a control token.
        """
        asked = parse_exits(exits, self.n_blocks, self.default_exit) if isinstance(exits, str) else exits
        picture = None if image is None else self.picture(as_image(image))
        ids, extras = self.prompt(prompt, picture and picture.layout)
        tokens = torch.tensor([ids], device=self.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if picture or not self.family.image_in_every_row:  # cross-attention masks belong to an image
            inputs |= {name: value.to(self.device) for name, value in extras.items()}
        inputs |= picture.inputs if picture else {}
        answers = {}
        for exit in asked:
            with exit_at(self, exit):
                found = self.model.generate(**inputs, generation_config=self.greedy(max_new_tokens))
            answers[Exit.of(exit)] = self.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).strip()
        return answers

    def greedy(self, max_new_tokens: int) -> "GenerationConfig":
        """The generation config of greedy answers that end at `stop_ids`; the rest is the checkpoint's."""
        from transformers import GenerationConfig

        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=min(self.stop_ids) if pad is None else pad,
        )

    @property
    def stop_ids(self) -> set[int]:
        """Ids of the tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return set(ids) if isinstance(ids, list) else {cast(int, ids)}

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> "StockTokenizer":
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def shares_prefix(self) -> bool:
        """Whether the part of a prompt up to its image may be computed once for all questions (engines/prefix.py)."""
        return shares_prefix(self.model)

    @property
    def takes_layers(self) -> int:
        """How many layers the connector concatenates; 0 where it takes one."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        return len(layers) if isinstance(layers, list | tuple) else 0

    @property
    def image_token_id(self) -> int:
        """Id of the tokens that image features replace; for mllama, of the token that marks the image."""
        return self.model.config.image_token_id

    @property
    def image_token(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    @property
    def placeholder(self) -> str:
        """The word for an image in the text that the processor takes."""
        return getattr(self.processor, "image_token", None) or self.image_token

    def picture(self, image: Image.Image) -> Picture:
        """The inputs of the image encoder for one image: pixels, and sizes, grids or masks where the family has them.

        Raises:
            UserError: the processor cannot take the image.
        """
        with recorded(self.processor) as record:
            text = f"{self.tokenizer.bos_token or ''}{self.placeholder}"
            try:
                found = self.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
            except (ValueError, ZeroDivisionError, RuntimeError, TypeError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise UserError(
                    f"the image processor of {self.name} cannot take an image of {image.width} x {image.height} pixels "
                    f"({first}); use an image with another size or aspect ratio"
                ) from error
        inputs = {
            name: value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)
            for name in self.family.image_inputs
            if (value := found.get(name)) is not None
        }
        return Picture(inputs, Layout({name: drop_pixels(value) for name, value in (record.output or {}).items()}))

    def prompt(self, text: str, layout: "Layout | int | None") -> Prompt:
        """A tokenised prompt with the image that `layout` describes, by the stock processor.

        Args:
            layout: of `picture`; for families whose image is one token repeated, the number of these tokens may be
                given instead; None or 0 for no image.

        Raises:
            UserError: the prompt has a control token, or the chat template is invalid or has no image placeholder.
        """
        if isinstance(layout, int):
            return Prompt(self.input_ids(text, layout), {})
        chat = self.chat(text, with_image=layout is not None)
        bos = self.tokenizer.bos_token
        special = not (bos and chat.startswith(bos))
        if layout is None:
            ids = self.tokenizer(chat, add_special_tokens=special).input_ids
            return Prompt(ids, {name: torch.zeros(1, len(ids), dtype=torch.long) for name in self.family.token_inputs})
        if self.placeholder not in chat:
            raise UserError(
                f"the chat template of {self.name} has no image placeholder; use a chat template that has one"
            )
        with recorded(self.processor, layout):
            blank = Image.new("RGB", (1, 1))
            found = self.processor(images=[blank], text=[chat], return_tensors="pt", add_special_tokens=special)
        names = self.family.token_inputs + self.family.grid_inputs
        return Prompt(found["input_ids"][0].tolist(), {name: found[name] for name in names if name in found})

    def control_token(self, prompt: str) -> str:
        """The first control token in a prompt, in alphabetical order; "" for none."""
        tokens = {self.image_token, self.placeholder, *self.tokenizer.all_special_tokens}
        return next((t for t in sorted(tokens) if t in prompt), "")

    def chat(self, prompt: str, with_image: bool = True) -> str:
        """The text of a one-turn conversation up to where the answer begins, one image token where the image goes.

        Raises:
            UserError: the prompt itself holds a control token of the model (it could forge a turn or an image), or the
                chat template is broken.
        """
        token = self.control_token(prompt)
        if token:
            raise UserError(f"a prompt contains the control token {token!r}; take it out of: {prompt[:60]!r}")
        if self.processor.chat_template:
            content = [{"type": "image"}] if with_image else []
            content.append({"type": "text", "text": prompt})
            turn = [{"role": "user", "content": content}]
            try:
                return self.processor.apply_chat_template(turn, add_generation_prompt=True)
            except TemplateError as error:
                raise UserError(
                    f"the chat template of {self.name} is broken ({error}); repair it in the checkpoint"
                ) from error
        plain = self.family.plain[0 if with_image else 1]
        return plain.format(image=self.placeholder, text=prompt, bos=self.tokenizer.bos_token or "")

    def input_ids(self, prompt: str, n_image_tokens: int) -> list[int]:
        """Token ids of `chat`, the image token repeated `n_image_tokens` times (0: no image)."""
        text = self.chat(prompt, with_image=n_image_tokens > 0)
        text = text.replace(self.image_token, self.image_token * n_image_tokens)
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
        if ids.count(self.image_token_id) != n_image_tokens:
            raise UserError(
                f"the chat template of {self.name} has no image placeholder; use a chat template that has one"
            )
        return ids


def describe(name: str, model: "PreTrainedModel", processor: "ProcessorMixin | StockProcessor") -> Vlm:
    """A `Vlm` from a model and its processor already in memory.

    The default exit is the one the unchanged model uses: `vision_feature_layer` where the family has that key (the
    deepest, where it names several), else the encoder's end.

    Raises:
        UserError: the family or its image encoder is not supported, or `vision_feature_layer` does not exist.
    """
    stock, prepares = cast("StockModel", model), cast("StockProcessor", processor)
    check_family(name, model.config)
    blocks = find_blocks(stock)
    layers = getattr(model.config, "vision_feature_layer", -1)
    layers = [-1 if layers is None else layers] if not isinstance(layers, list | tuple) else layers
    if not layers or not all(-len(blocks) - 1 <= layer <= len(blocks) for layer in layers):
        raise UserError(f"{name} has vision_feature_layer = {layers}, but its encoder has {len(blocks)} blocks")
    prepares.tokenizer.padding_side = "left"
    return Vlm(name, stock, prepares, blocks, max(absolute(layer, len(blocks)) for layer in layers))
