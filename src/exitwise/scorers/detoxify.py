"""Toxicity by Detoxify (Hanu and Unitary team 2020, PyPI package detoxify): its class "toxicity", a probability."""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from ..model.quiet import quiet
from ..run.records import Completion, Sample
from .base import About, Mark, Pair

MODELS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")


class DetoxifyScorer:
    """Loads the package's model: one of MODELS (downloaded by the package), or a checkpoint file of the same layout.

    A folder that holds the checkpoint beside config.json and tokenizer files loads without any download.

    Raises:
        UserError: the package is not installed, `model` is neither, or the user does not trust its pickle files.
    """

    def __init__(self, model: str | None = None, batch_size: int = 32, trust_remote_code: bool = False):
        model = model or "original"
        path = Path(model)
        if model not in MODELS and not path.is_file():
            raise UserError(f"--model got {model!r}; expected one of {', '.join(MODELS)}, or a checkpoint file")
        try:
            from detoxify import Detoxify
        except ImportError as error:
            raise missing_package("the scorer detoxify", error.name or "detoxify", "toxicity") from None
        if not trust_remote_code:
            raise UserError(
                "detoxify's checkpoints are pickle files, which can run code when they are loaded; give "
                "--trust-remote-code if you trust their source, or choose --scorer granite-guardian-hap"
            )
        version = f"{metadata.version('detoxify')} {model}"
        with quiet():
            if model in MODELS:
                self.model = Detoxify(model, device=_device())
            else:
                folder = str(path.parent) if (path.parent / "config.json").is_file() else None
                self.model = Detoxify(checkpoint=str(path), device=_device(), huggingface_config_path=folder)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
                version = f"{metadata.version('detoxify')} {path.name} {digest}"
        self.batch_size = batch_size
        self.about = About(
            name="detoxify",
            backend="detoxify",
            version=version,
            quantity="toxicity",
            kinds=("harmful",),
            settings={"model": model, "class": "toxicity", "batch_size": batch_size},
            licence="Apache-2.0",
        )

    def key(self, sample: Sample, completion: Completion) -> tuple[str, ...]:
        return (completion.text,)

    def score(self, batch: Sequence[Pair]) -> list[Mark]:
        texts = [completion.text for _, completion in batch if completion.text.strip()]
        found: Any = self.model.predict(texts)["toxicity"] if texts else []
        values = iter(found if isinstance(found, list) else [found])  # the package unpacks a list of one
        return [Mark(next(values)) if c.text.strip() else Mark(None, "empty answer") for _, c in batch]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
