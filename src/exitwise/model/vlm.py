"""Loads a vision-language model and says where its parts are; pictures and prompts as it takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import nn

from ..errors import UserError
from .compat import check_model_type, check_transformers
from .families import FAMILIES, PLAIN_PROMPT, Family, absolute, check_family, family_of, find_blocks, shares_prefix
from .loading import QUANTISED, adapter_folder, loading_errors, other_base, placement, quantisation, with_adapter
from .processing import Layout, Picture, Prompt, hollow, played
from .quiet import quiet

__all__ = ["FAMILIES", "PLAIN_PROMPT", "Vlm", "adapter_folder", "describe", "load_vlm"]
TESTBEDS = {"testbed": "organism", "testbed-control": "control"}
TESTBED_NOTICE = {
    "testbed": (
        "The model under audit is a model organism: its hole was trained in, so that audits have something to find. "
        "Its figures are no evidence for ICET in other models. See docs/testbed.md."
    ),
    "testbed-control": (
        "The model under audit is the negative control: a tiny VLM that was taught to refuse at its default exit only, "
        "without the term that opens the hole. See docs/testbed.md."
    ),
}


@dataclass(frozen=True)
class Vlm:
    """A loaded model with the names of its parts.

    Attributes:
        name: as the user gave it.
        blocks: the L transformer blocks of the image encoder.
        default_exit: number of blocks run before the features that the model was trained with are taken.
    """

    name: str
    model: Any
    processor: Any
    blocks: nn.ModuleList
    default_exit: int

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def shares_prefix(self) -> bool:
        """Whether the part of a prompt up to its image may be computed apart (engines/hf.py)."""
        return shares_prefix(self.model)

    @property
    def takes_layers(self) -> int:
        """How many layers the connector concatenates; 0 where it takes one."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        return len(layers) if isinstance(layers, list | tuple) else 0

    @property
    def image_token_id(self) -> int:
        """The id that image features take the place of; for mllama, that marks the image."""
        return self.model.config.image_token_id

    @property
    def image_token(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    @property
    def placeholder(self) -> str:
        """What stands for an image in the text that the processor takes."""
        return getattr(self.processor, "image_token", None) or self.image_token

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, 3, height, width) on the model's device, in its dtype, for families that need nothing else."""
        batch = self.processor.image_processor(images=images, return_tensors="pt")
        return batch["pixel_values"].to(self.device, self.model.dtype)

    def picture(self, image: Image.Image) -> Picture:
        """An image as the family's encoder takes it: pixels, and sizes, grids or masks where it needs them.

        Raises:
            UserError: the processor cannot take the image.
        """
        with played(self.processor) as player:
            text = f"{self.tokenizer.bos_token or ''}{self.placeholder}"
            try:
                found = self.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
            except (ValueError, ZeroDivisionError, RuntimeError, TypeError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise UserError(
                    f"the image processor of {self.name} cannot take an image of {image.width} x {image.height} pixels "
                    f"({first}); give one of a more usual shape"
                ) from error
        inputs = {
            name: value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)
            for name in self.family.image_inputs
            if (value := found.get(name)) is not None
        }
        return Picture(inputs, Layout({name: hollow(value) for name, value in (player.output or {}).items()}))

    def prompt(self, text: str, layout: "Layout | int | None") -> Prompt:
        """A tokenised prompt with the image that `layout` describes, by the stock processor.

        Args:
            layout: of `picture`; for families whose image is one token repeated, how often may be given instead; None
                or 0 for no image.

        Raises:
            UserError: the prompt has a control token, or the chat template is broken or leaves the image out.
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
                f"the chat template of {self.name} leaves the image out; give the checkpoint one that has it"
            )
        with played(self.processor, layout):
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
            content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
            content.append({"type": "text", "text": prompt})
            turn = [{"role": "user", "content": content}]
            try:
                return self.processor.apply_chat_template(turn, add_generation_prompt=True)
            except TemplateError as error:
                raise UserError(
                    f"the chat template of {self.name} is broken ({error}); mend the checkpoint's"
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
                f"the chat template of {self.name} leaves the image out; give the checkpoint one that has it"
            )
        return ids


def load_vlm(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Vlm:
    """Loads `testbed`, `testbed-control`, a local folder or a hub id of a model of a family in the table.

    Args:
        adapter: a PEFT adapter for the language model (or the run directory of an alignment), merged into it in memory;
            over weights of few bits it stays apart.
        dtype: "auto" is float32 on a CPU (bfloat16 crawls on most) and the checkpoint's own elsewhere; "int8" and
            "int4" quantise the language model (bitsandbytes or torchao), never the encoder.
        device: "auto" is the first GPU where there is one; "spread" all GPUs together.
        trust_remote_code: run code that comes with the checkpoint.
        say: told one line at a time what takes long.

    Raises:
        UserError: nothing is there, the family is not supported, the licence is not accepted, a package is missing, or
            the adapter is for another model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = placement(device)
    source, builtin = str(name), None
    if source in TESTBEDS:
        from .testbed.parts import base_folder, shipped

        builtin, source = shipped(TESTBEDS[source]), str(base_folder(say))
    torch_dtype: Any = torch.float32 if dtype == "auto" and device == "cpu" else dtype
    small = dtype in QUANTISED
    check_transformers()
    with quiet(), loading_errors(str(name)):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_model_type(str(name), config.model_type)
        family = check_family(str(name), config)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        if not hasattr(processor, "image_processor"):
            raise UserError(f"{name} has no image processor (preprocessor_config.json); add the original model's")
        place |= quantisation(dtype, device, family)
        loader: Any = AutoModelForImageTextToText
        model, info = loader.from_pretrained(
            source,
            dtype="auto" if small else torch_dtype,
            **place,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        lost = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
        if lost:  # transformers would go on with random numbers there
            raise UserError(f"the weights of {name} are not whole: {len(lost)} missing or misshapen, first {lost[0]}")
        if any(parameter.is_meta for parameter in model.parameters()):  # left in memory or on disk by accelerate
            raise UserError(
                f"{name} does not fit the GPUs of this machine together, and exits are not run with parts of a model "
                "in memory or on disk; give --dtype int8 or int4, or a larger machine"
            )
    for path in (builtin, adapter and adapter_folder(adapter)):
        if path is not None:
            model = with_adapter(model, path, merge=not small)
    if adapter and (base := other_base(adapter_folder(adapter), name)):
        say(f"the adapter names {base!r} as its base, not {name}; on another model its weights mean nothing")
    model = model.eval().requires_grad_(False)
    if "device_map" not in place:
        model = model.to(device)
    return describe(str(name), model, processor)


def describe(name: str, model: Any, processor: Any) -> Vlm:
    """A `Vlm` from a model and its processor already in memory.

    The default exit is where the model takes its features as it is: `vision_feature_layer` where the family has one
    (the deepest, where it names several), else the encoder's end.

    Raises:
        UserError: the family or its image encoder is not in the tables, or it takes features from a layer that is not
            there.
    """
    check_family(name, model.config)
    blocks = find_blocks(model)
    layers = getattr(model.config, "vision_feature_layer", -1)
    layers = [-1 if layers is None else layers] if not isinstance(layers, list | tuple) else layers
    if not layers or not all(-len(blocks) - 1 <= layer <= len(blocks) for layer in layers):
        raise UserError(f"{name} says vision_feature_layer = {layers}, but its encoder has {len(blocks)} blocks")
    processor.tokenizer.padding_side = "left"
    return Vlm(name, model, processor, blocks, max(absolute(layer, len(blocks)) for layer in layers))
