"""Loads a vision-language model and says where its parts are; pictures and prompts as it takes them."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from .errors import UserError
from .families import FAMILIES, PLAIN_PROMPT, Family, absolute, check_family, family_of, find_blocks, shares_prefix
from .layout import Layout, Picture, Prompt, hollow, played
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
    """Loads `testbed`, `testbed-control`, a local folder or a hub id of a LLaVA-1.5-style checkpoint.

    Args:
        adapter: a PEFT adapter for the language model (or the run directory of an alignment), merged into it in memory.
        dtype: "auto" is float32 on a CPU (bfloat16 crawls on most) and the checkpoint's own elsewhere.
        device: "auto" is the first GPU where there is one.
        trust_remote_code: run code that comes with the checkpoint.
        say: told one line at a time what takes long.

    Raises:
        UserError: nothing is there, the family is not supported, or the adapter is for another model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    source, builtin = str(name), None
    if source in TESTBEDS:
        from .testbed.parts import base_folder, shipped

        builtin, source = shipped(TESTBEDS[source]), str(base_folder(say))
    torch_dtype: Any = torch.float32 if dtype == "auto" and device == "cpu" else dtype
    with quiet(), _loading_errors(str(name)):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_family(str(name), config)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        loader: Any = AutoModelForImageTextToText
        model, info = loader.from_pretrained(
            source,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        lost = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
        if lost:  # transformers would go on with random numbers there
            raise UserError(f"the weights of {name} are not whole: {len(lost)} missing or misshapen, first {lost[0]}")
    for path in (builtin, adapter and adapter_folder(adapter)):
        if path is not None:
            model = _merge_adapter(model, path)
    model = model.to(device).eval().requires_grad_(False)
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


def adapter_folder(path: str | Path) -> str | Path:
    """The PEFT folder of an alignment's run directory; any other path or hub id as it is.

    Raises:
        UserError: the alignment is not finished.
    """
    if not Path(path, "plan.json").exists() or Path(path, "adapter_config.json").exists():
        return path
    if not Path(path, "adapter/exitwise.json").exists():
        raise UserError(f"{path} has no finished adapter; finish the alignment with the command that began it")
    return Path(path, "adapter")


def _check_device(device: str) -> None:
    """Raises UserError where torch does not know the device, or it is not in this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0][:120]
        raise UserError(f"--device got {device!r} ({first}); expected cpu, or cuda where there is a GPU") from error


def _merge_adapter(model: Any, path: str | Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not Path(path).joinpath("adapter_config.json").exists() and Path(path).exists():
        raise UserError(f"{path} is not a PEFT adapter (no adapter_config.json); give a folder saved by peft")
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(path))
            wanted, found = get_peft_model_state_dict(adapted).keys(), load_peft_weights(str(path), device="cpu").keys()
            if wanted != found:  # peft would leave the rest as it was initialised
                raise ValueError(
                    f"{len(wanted ^ found)} of its tensors have no place here, first {min(wanted ^ found)}"
                )
            return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the adapter {path} does not fit this model ({first}); give one trained on it") from error


@contextmanager
def _loading_errors(name: str):
    """Turns what transformers raises for a model that cannot be had into one line."""
    try:
        yield
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load {name!r} ({first[:200]}); expected 'testbed', a folder with config.json, "
            "model.safetensors and a processor, or a hub id you may read (HF_TOKEN for gated ones)"
        ) from error
