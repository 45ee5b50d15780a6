"""Records the versions, machine and commit of a run, and computes a fingerprint of its model."""

import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

from .. import __version__


def fingerprint(vlm: Any) -> str:
    """sha256 of device, dtype and every tensor's name, shape and sum: another model or device shows."""
    digest = hashlib.sha256(f"{vlm.device.type} {vlm.model.dtype}".encode())
    for name, tensor in vlm.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item():.9e}".encode())
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str | None]:
    """The version of exitwise and of each package, None where it is not installed."""
    from importlib import metadata  # takes longer to import than most of what reads a run

    found: dict[str, str | None] = {"exitwise": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment(vlm: Any) -> dict[str, Any]:
    """Versions, machine and commit: what env.json holds."""
    import torch

    packages = (
        "torch",
        "transformers",
        "peft",
        "tokenizers",
        "numpy",
        "pillow",
        "scikit-image",
        "easy-vqa",
        "torchvision",
    )
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "versions": versions(*packages),
        "processor": _processor_classes(vlm),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(vlm.device) if vlm.device.type == "cuda" else "cpu",
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "git": git.stdout.strip() if git.returncode == 0 else None,
    }


def _processor_classes(vlm: Any) -> list[str] | None:
    """Classes of the processor and its image processor, which depend on torchvision; None for a text model."""
    processor = getattr(vlm, "processor", None)
    return processor and [type(processor).__name__, type(processor.image_processor).__name__]
