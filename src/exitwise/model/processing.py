"""How a processor writes an image into a prompt, kept so that a picture is processed once and not for every prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature

SMALL = 4096  # values; what is larger is pixels, which no prompt depends on


class Layout(NamedTuple):
    """What the image processor gave for one picture, large arrays replaced by zeros that take no memory."""

    output: dict[str, Any]


class Prompt(NamedTuple):
    """A tokenised prompt: its ids, and what the family needs beside them, by name, batch of one."""

    ids: list[int]
    extras: dict[str, torch.Tensor]


class Picture(NamedTuple):
    """An image as its model takes it."""

    inputs: dict[str, torch.Tensor]
    layout: Layout


def hollow(value: Any) -> Any:
    """The value with large arrays replaced by zeros of their shape."""
    if isinstance(value, torch.Tensor) and value.numel() > SMALL:
        return torch.zeros((), dtype=value.dtype).expand(value.shape)
    if isinstance(value, np.ndarray) and value.size > SMALL:
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return [hollow(v) for v in value] if isinstance(value, list | tuple) else value


class _Played:
    """Stands in for an image processor: notes what it gives, or gives what was noted."""

    def __init__(self, real: Any, output: dict[str, Any] | None):
        self.real, self.output = real, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        if self.output is None:
            self.output = dict(self.real(*args, **kwargs))
        return BatchFeature(dict(self.output))


@contextmanager
def played(processor: Any, layout: Layout | None = None) -> Iterator[_Played]:
    """Within it the processor's image processor notes its answer, or repeats the one in `layout`."""
    real = processor.image_processor
    player = _Played(real, layout and layout.output)
    processor.image_processor = player
    try:
        yield player
    finally:
        processor.image_processor = real
