"""Differences between the versions of transformers that exitwise runs with, and the refusal of those it does not.

No other module asks for a version. What a version lacks is found by looking for it where that is possible, so that a
release in between needs no entry.
"""

import importlib.util
from dataclasses import fields
from importlib import metadata
from typing import Protocol

from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UserError

FLOOR = Version("5.19")
"""The oldest transformers of pyproject.toml. 5.17 has no `mm_encoder_outputs`: exit features could not be passed in."""
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""Argument and output field with the keys and values of a forward pass; transformers 5.24 renamed it."""
BROKEN = {("llama4", "5.24"): "its forward pass raises AttributeError ('image_outputs')"}
"""{(model type, minor version of transformers): what fails}: defects of transformers, not of exitwise."""
VISION_PACKAGES = ("torchvision", "num2words")
"""Packages of the extra `vision`, which some processors import."""


class _Checkpointed(Protocol):
    """The part of a transformers model that turns activation checkpointing on, by either name."""

    def gradient_checkpointing_enable(self, options: dict[str, bool], /) -> None: ...


def transformers_version() -> Version:
    return Version(metadata.version("transformers"))


def check_transformers() -> None:
    """Raises UserError where the installed transformers is too old for exit features to reach the language model."""
    if (found := transformers_version()) < FLOOR:
        raise UserError(
            f"exitwise needs transformers {FLOOR} or newer, and {found} is installed; "
            f"run: pip install 'transformers>={FLOOR},<6'"
        )


def defect(model_type: str) -> str | None:
    """What fails for a model type in the installed transformers; None where nothing is known to fail."""
    found = transformers_version()
    return BROKEN.get((model_type, f"{found.major}.{found.minor}"))


def check_model_type(name: str, model_type: str) -> None:
    """Raises UserError where the installed transformers cannot run this type of model."""
    if reason := defect(model_type):
        raise UserError(
            f"transformers {transformers_version()} cannot run {name}, a {model_type!r} model ({reason}); "
            "install another version of transformers"
        )


def checkpoint_activations(model: _Checkpointed) -> None:
    """Recomputes activations in the backward pass; before transformers 5.23 only the older name exists."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def missing_vision_package(message: str) -> str | None:
    """Which package of the extra `vision` an error of transformers is about, where that is not installed."""
    absent = [package for package in VISION_PACKAGES if importlib.util.find_spec(package) is None]
    text = message.lower()
    named = [package for package in absent if package in text]
    if not named and "torchvision" in absent and "could not load any image processor class" in text:
        return "torchvision"
    return named[0] if named else None


def installed_torch() -> str:
    """`torch==…` of the installed torch: pip replaces torch for a newer torchvision unless it is named."""
    return f"torch=={Version(metadata.version('torch')).public}"
