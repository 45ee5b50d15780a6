"""What can be asked of loading (where, how small, with which adapter), and what can go wrong with it, in one line."""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import UserError, missing_package
from .compat import installed_torch, missing_vision_package
from .families import Family
from .quiet import quiet

QUANTISED = {"int8": 8, "int4": 4}
"""Values of dtype that load the language model with so many bits a weight."""
GATED = ("gated repo", "GatedRepo", "Access to model", "awaiting a review")
"""Words of errors of the hub where a licence or a token is missing."""
TEXT_MODEL = (
    "a folder with config.json, model.safetensors and a tokenizer, or a hub id you may read (HF_TOKEN for gated ones)"
)
"""What `loading_errors` says is expected where a text model is loaded."""
VISION_MODEL = f"'testbed', {TEXT_MODEL.replace('tokenizer', 'processor')}"
SPREAD = "spread"
"""Value of device that spreads a model over all GPUs."""


def placement(device: str) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a device.

    Raises:
        UserError: torch does not know the device, or it is not in this machine.
    """
    if device == SPREAD:
        return {"device_map": "auto"}
    check_device(device)
    return {}


def quantisation(dtype: str, device: str, family: Family) -> dict[str, Any]:
    """Keywords of `from_pretrained` that make the language model small, by bitsandbytes, else by torchao.

    Encoder and projector keep their precision: exits are to be those of the encoder as it is.

    Raises:
        UserError: neither package is installed, or bitsandbytes has no GPU to work on.
    """
    if dtype not in QUANTISED:
        return {}
    bits = QUANTISED[dtype]
    keep = [path.removeprefix("model.") for path in (family.tower, family.projector) if path] + ["lm_head"]
    if importlib.util.find_spec("bitsandbytes"):
        if not torch.cuda.is_available():
            raise UserError(f"--dtype {dtype} by bitsandbytes needs a GPU, and there is none; give --dtype float32")
        from transformers import BitsAndBytesConfig

        config: Any = BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=keep,
        )
        return {"quantization_config": config} | ({} if device == SPREAD else {"device_map": {"": device}})
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        kind = Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig()
        return {"quantization_config": TorchAoConfig(kind, modules_to_not_convert=keep)}
    raise missing_package(f"--dtype {dtype}", "bitsandbytes (or torchao)", "quantise")


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


def other_base(adapter: str | Path, name: str | Path) -> str:
    """The base model that an adapter's own config names, where that is not `name`; "" where it is or cannot be told."""
    try:
        base = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(base) if base and Path(base).resolve() != Path(name).resolve() else ""


def check_device(device: str) -> None:
    """Raises UserError where torch does not know the device, or it is not in this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0][:120]
        raise UserError(f"--device got {device!r} ({first}); expected cpu, or cuda where there is a GPU") from error


def with_adapter(model: Any, path: str | Path, merge: bool = True) -> Any:
    """The model with a PEFT adapter: merged, or, where weights have few bits, laid over them.

    Raises:
        UserError: it is no adapter, or not one of this model.
    """
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
            return adapted.merge_and_unload(safe_merge=True) if merge else adapted.get_base_model()
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        message = f"the adapter {path} does not fit this model ({first_line(error)}); give one trained on it"
        raise UserError(message) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def loading_errors(name: str, expected: str = VISION_MODEL) -> Iterator[None]:
    """Turns what transformers raises for a model that cannot be loaded into one line.

    Args:
        expected: what the user may give instead.

    Raises:
        UserError: for any exception of the block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a broken checkpoint makes transformers raise
        cause = " ".join(str(error).split()) or type(error).__name__
        if any(word in str(error) for word in GATED):
            raise UserError(
                f"{name} is gated: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN to a token "
                "of that account"
            ) from error
        if package := missing_vision_package(cause):
            raise missing_package(f"the processor of {name}", package, "vision", installed_torch()) from error
        raise UserError(f"cannot load {name!r} ({cause[:200]}); expected {expected}") from error
