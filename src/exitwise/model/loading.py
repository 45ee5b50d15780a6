"""Loads a vision-language model: device, quantisation and adapter options, with one-line errors."""

import importlib.util
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError

from ..errors import UserError, missing_package
from .compat import check_model_type, check_transformers, installed_torch, missing_vision_package
from .families import Family, check_family
from .quiet import quiet
from .testbed import TESTBEDS
from .vlm import Vlm, describe

if TYPE_CHECKING:
    from .types import StockModel, StockProcessor

QUANTISED = {"int8": 8, "int4": 4}
"""Bits a weight of the language model, by the value of dtype."""
GATED = ("gated repo", "GatedRepo", "Access to model", "awaiting a review")
"""Phrases in the hub's errors where a licence or a token is missing."""
SPREAD = "spread"
"""Value of device that spreads a model over all GPUs."""
LoadingInfo = Mapping[str, Collection[object]]
"""The keys that were missing or misshapen, as `from_pretrained` returns them with `output_loading_info`."""
TEXT_MODEL = (
    "a folder with config.json, model.safetensors and a tokenizer, or a hub id you may read (HF_TOKEN for gated ones)"
)
"""The expected input in `loading_errors` where a text model is loaded."""
VISION_MODEL = f"'testbed', {TEXT_MODEL.replace('tokenizer', 'processor')}"


def load_vlm(
    name: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Vlm:
    """Loads `testbed`, `testbed-control`, a local folder or a hub id of a model of a supported family.

    Args:
        adapter: a PEFT adapter for the language model (or the run directory of an alignment), merged in memory; over
            quantised weights it stays separate.
        dtype: "auto" is float32 on a CPU (bfloat16 is slow on most) and the checkpoint's own elsewhere; "int8" and
            "int4" quantise the language model (bitsandbytes or torchao), never the encoder.
        device: "auto" is the first GPU where there is one; "spread" uses all GPUs together.
        trust_remote_code: run code that comes with the checkpoint.
        say: called with one line of text before each step that takes long.

    Raises:
        UserError: nothing is found under the name, the family is not supported, the licence is not accepted, a package
            is missing, or the adapter is for another model.
    """
    check_transformers()
    device = choose_device(device)
    source, adapters = str(name), [adapter_folder(adapter)] if adapter else []
    if source in TESTBEDS:
        from .testbed.parts import base_folder, shipped

        adapters.insert(0, shipped(TESTBEDS[source]))
        source = str(base_folder(say))
    with quiet(), loading_errors(str(name)):
        processor, family = _load_processor(str(name), source, trust_remote_code)
        keywords = placement(device) | quantisation(dtype, device, family)
        model = _load_weights(str(name), source, _torch_dtype(dtype, device), trust_remote_code, keywords)
    for path in adapters:
        model = with_adapter(model, path, merge=dtype not in QUANTISED)
    if adapter and (base := other_base(adapters[-1], name)):
        say(f"the adapter names {base!r} as its base model, not {name}; it may have no useful effect on another model")
    model = model.eval().requires_grad_(False)
    vlm = describe(str(name), model if "device_map" in keywords else model.to(device), processor)
    return replace(vlm, adapter=None if adapter is None else str(adapter))


def choose_device(device: str) -> str:
    """The device itself; for "auto" the first GPU where there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_dtype(dtype: str, device: str) -> str | torch.dtype:
    """The dtype that `from_pretrained` takes for the weights that are not quantised."""
    if dtype in QUANTISED:
        return "auto"
    return torch.float32 if dtype == "auto" and device == "cpu" else dtype


def _load_processor(name: str, source: str, trust_remote_code: bool) -> tuple["StockProcessor", Family]:
    """The processor, and the family that config.json names: an unsupported one shows before weights are read."""
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    check_model_type(name, config.model_type)
    family = check_family(name, config)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{name} has no image processor (preprocessor_config.json); add that of the original model")
    return processor, family


def _load_weights(
    name: str, source: str, dtype: str | torch.dtype, trust_remote_code: bool, keywords: Mapping[str, object]
) -> "StockModel":
    from transformers import AutoModelForImageTextToText

    load = cast("Callable[..., tuple[StockModel, LoadingInfo]]", AutoModelForImageTextToText.from_pretrained)
    model, info = load(
        source,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **keywords,
    )
    check_weights(name, info)
    if any(parameter.is_meta for parameter in model.parameters()):  # left in memory or on disk by accelerate
        raise UserError(
            f"{name} does not fit the GPUs of this machine together, and exits are not run with parts of a model "
            "in memory or on disk; give --dtype int8 or int4, or a larger machine"
        )
    return model


def check_weights(name: str, info: LoadingInfo) -> None:
    """Raises UserError where the weights lack tensors of the model; transformers would fill them at random."""
    lost = sorted({str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])})
    if lost:
        raise UserError(f"the weights of {name} are not whole: {len(lost)} missing or misshapen, first {lost[0]}")


def placement(device: str) -> dict[str, object]:
    """Keywords of `from_pretrained` for a device.

    Raises:
        UserError: torch does not know the device, or this machine has none.
    """
    if device == SPREAD:
        return {"device_map": "auto"}
    check_device(device)
    return {}


def quantisation(dtype: str, device: str, family: Family) -> dict[str, object]:
    """Keywords of `from_pretrained` that quantise the language model, by bitsandbytes, else by torchao.

    Encoder and projector keep their precision, so that the exits are those of the original encoder.

    Raises:
        UserError: neither package is installed, or bitsandbytes finds no GPU.
    """
    if dtype not in QUANTISED:
        return {}
    bits = QUANTISED[dtype]
    keep = [path.removeprefix("model.") for path in (family.tower, family.projector) if path] + ["lm_head"]
    if importlib.util.find_spec("bitsandbytes"):
        if not torch.cuda.is_available():
            raise UserError(f"--dtype {dtype} by bitsandbytes needs a GPU, and none was found; give --dtype float32")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
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


def adapter_folder(path: str | PathLike[str]) -> str | PathLike[str]:
    """The PEFT folder of an alignment's run directory; any other path or hub id as it is.

    Raises:
        UserError: the alignment is not finished.
    """
    if not Path(path, "plan.json").exists() or Path(path, "adapter_config.json").exists():
        return path
    if not Path(path, "adapter/exitwise.json").exists():
        raise UserError(
            f"{path} has no finished adapter; finish the alignment by running the command that began it again"
        )
    return Path(path, "adapter")


def other_base(adapter: str | PathLike[str], name: str | PathLike[str]) -> str:
    """The base model that an adapter's config names, where that is not `name`; "" where it is, or none is named."""
    try:
        base = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(base) if base and Path(base).resolve() != Path(name).resolve() else ""


def check_device(device: str) -> None:
    """Raises UserError where torch does not know the device, or this machine has none."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0][:120]
        raise UserError(f"--device got {device!r} ({first}); expected cpu, or cuda where there is a GPU") from error


def with_adapter(model: "StockModel", path: str | PathLike[str], merge: bool = True) -> "StockModel":
    """The model with a PEFT adapter: merged, or kept separate over quantised weights.

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
                raise ValueError(f"{len(wanted ^ found)} tensors differ in name, first {min(wanted ^ found)}")
            base = adapted.merge_and_unload(safe_merge=True) if merge else adapted.get_base_model()
            return cast("StockModel", base)
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
        if any(phrase in str(error) for phrase in GATED):
            raise UserError(
                f"{name} is gated: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN to a token "
                "of that account"
            ) from error
        if package := missing_vision_package(cause):
            raise missing_package(f"the processor of {name}", package, "vision", installed_torch()) from error
        raise UserError(f"cannot load {name!r} ({cause[:200]}); expected {expected}") from error
