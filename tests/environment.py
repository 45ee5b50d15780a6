"""What depends on the installed packages: the image processors of the tests, and families that a release cannot run."""

import importlib.util
from typing import Any

import transformers as hf
from packaging.version import Version

from exitwise.model.compat import BROKEN, defect

TORCHVISION = importlib.util.find_spec("torchvision") is not None


def image_processor(name: str) -> Any:
    """The class that AutoProcessor loads here: torchvision's where that is installed, else the one on PIL and numpy."""
    return getattr(hf, f"{name}ImageProcessor" if TORCHVISION else f"{name}ImageProcessorPil")


def not_here() -> dict[str, str]:
    """Families that cannot be built or run with the installed packages, and why."""
    found = {family: reason for family, _ in BROKEN if (reason := defect(family))}
    if not TORCHVISION and Version(hf.__version__) < Version("5.23"):
        found["gemma4"] = "its processor imports torchvision before transformers 5.23"
    return found
