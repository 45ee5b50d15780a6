"""Records how a processor writes an image into a prompt, so that each image is processed once and not per prompt."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature

from ..data.images import load_image, to_rgb

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from .types import StockProcessor

SMALL = 4096  # values; larger arrays are pixels, which no prompt depends on


class Layout(NamedTuple):
    """The output of the image processor for one image, large arrays replaced by zeros that take no memory."""

    output: Mapping[str, object]


class Prompt(NamedTuple):
    """A tokenised prompt: its ids, and the family's other inputs by name, with a batch size of one."""

    ids: list[int]
    extras: dict[str, torch.Tensor]


class Picture(NamedTuple):
    """The inputs of the image encoder for one image, and its layout in a prompt."""

    inputs: dict[str, torch.Tensor]
    layout: Layout


def as_image(image: Image.Image | str | PathLike[str]) -> Image.Image:
    """An image in mode RGB, as an audit reads it.

    Args:
        image: a PIL image, the path of an image file, or a name that prompt files take ("photo:coffee").

    Raises:
        UserError: there is no such file or name, or it cannot be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    path = Path(image)
    if isinstance(image, str) and not path.is_file():
        return load_image(image, None)
    return load_image(f"file:{path.name}", path.parent)


def drop_pixels(value: object) -> object:
    """The value with large arrays replaced by zeros of their shape."""
    if isinstance(value, torch.Tensor) and value.numel() > SMALL:
        return torch.zeros((), dtype=value.dtype).expand(value.shape)
    if isinstance(value, np.ndarray) and value.size > SMALL:
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return [drop_pixels(v) for v in value] if isinstance(value, list | tuple) else value


class _RecordedProcessor:
    """Replaces an image processor: records its output, or returns a recorded one."""

    def __init__(self, real: "BaseImageProcessor", output: Mapping[str, object] | None):
        self.real, self.output = real, output

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def __call__(self, *args: object, **kwargs: object) -> BatchFeature:
        if self.output is None:
            self.output = dict(cast(Callable[..., BatchFeature], self.real)(*args, **kwargs))
        return BatchFeature(dict(self.output))


@contextmanager
def recorded(processor: "StockProcessor", layout: Layout | None = None) -> Iterator[_RecordedProcessor]:
    """Within it the processor's image processor records its output, or returns the one in `layout`."""
    real = processor.image_processor
    record = _RecordedProcessor(real, layout and layout.output)
    processor.image_processor = cast("BaseImageProcessor", record)
    try:
        yield record
    finally:
        processor.image_processor = real
