"""Caches of image features at exits: in memory for an audit, in files for an alignment."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..run.exit import Exit
from .exits import exit_features
from .processing import Layout
from .vlm import Vlm

KEPT_BYTES = 2 << 30  # of features; the plan asks image by image, so a small part of a large set is enough


class Phases(Protocol):
    """A clock that measures named phases (run/clock.py)."""

    def phase(self, name: str) -> AbstractContextManager[None]: ...


class FeatureCache:
    """`cache(image name, exit)` -> (P, H); every image is encoded by itself, so its features depend on nothing else."""

    def __init__(self, vlm: Vlm, exits: Sequence[Exit], load: Callable[[str], Image.Image], clock: Phases):
        self.vlm, self.exits, self.load, self.clock = vlm, exits, load, clock
        self.kept: OrderedDict[str, dict[Exit, torch.Tensor]] = OrderedDict()
        self.counts: dict[str, int] = {}
        self.layouts: dict[str, Layout] = {}

    def __call__(self, name: str, exit: Exit) -> torch.Tensor:
        if name not in self.kept:
            with self.clock.phase("encode"):
                self.kept[name] = exit_features(self.vlm, self.load(name), self.exits)
            size = sum(f.nbytes for f in self.kept[name].values())
            while len(self.kept) > max(1, KEPT_BYTES // size):
                self.kept.popitem(last=False)
        self.kept.move_to_end(name)
        return self.kept[name][exit]

    def n_tokens(self, name: str) -> int:
        """P, the rows of this image's features."""
        if name not in self.counts:
            self.counts[name] = len(self(name, self.exits[0]))
        return self.counts[name]

    def layout(self, name: str) -> Layout | int:
        """The layout of this image in prompts: P where it is one token repeated, else the output of the processor."""
        if self.vlm.family.counted:
            return self.n_tokens(name)
        if name not in self.layouts:
            self.layouts[name] = self.vlm.picture(self.load(name)).layout
        return self.layouts[name]


class FeatureFiles:
    """`files(image name, exit)` -> (P, H), read from memory-mapped files: after `fill` the encoder is not needed.

    One safetensors file per image, named by the image, the model and the pixels, with one tensor per exit. Files are
    written whole or not at all, so a folder may be shared by runs and survives a kill.
    """

    def __init__(self, folder: Path, model_sha256: str, device: torch.device):
        self.folder, self.model_sha256, self.device = folder, model_sha256, device
        self.paths: dict[str, Path] = {}
        self.layouts: dict[str, Layout] = {}
        self.read = lru_cache(maxsize=256)(self._read)

    def fill(
        self,
        vlm: Vlm,
        images: dict[str, Callable[[], Image.Image]],
        exits: Sequence[Exit],
    ) -> int:
        """Encodes the images whose files lack any of these exits; returns the number of encoded images.

        Args:
            images: functions that load each image, by name.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.folder} is no folder; give --features one, new or of an earlier run") from None
        encoded = 0
        for name, load in images.items():
            image = load()
            if not vlm.family.counted:
                self.layouts[name] = vlm.picture(image).layout
            key = f"{self.model_sha256}\0{name}\0{image.size}\0".encode() + image.tobytes()
            path = self.paths[name] = self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
            there = _exits_in(path)
            if not there >= set(exits):
                features = exit_features(vlm, image, sorted(there | set(exits)))
                scratch = path.with_suffix(f".{os.getpid()}.tmp")
                with writing(scratch):
                    save_file({str(e): f.clone().contiguous() for e, f in features.items()}, scratch)
                os.replace(scratch, path)
                encoded += 1
        return encoded

    def __call__(self, name: str, exit: Exit) -> torch.Tensor:
        return self.read(name, exit)

    def _read(self, name: str, exit: Exit) -> torch.Tensor:
        with self._open(name) as file:
            return file.get_tensor(str(exit)).to(self.device)

    @contextmanager
    def _open(self, name: str) -> Iterator[safe_open]:
        """The file of an image; raises UserError where it cannot be read."""
        try:
            with safe_open(self.paths[name], framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the features of image {name!r} cannot be read ({error}); delete {self.folder} and start again"
            ) from None

    def layout(self, name: str) -> Layout | int:
        """The layout of this image in prompts: P where it is one token repeated, else the output of the processor."""
        return self.layouts[name] if name in self.layouts else self.n_tokens(name)

    def n_tokens(self, name: str) -> int:
        """P, the rows of this image's features."""
        with self._open(name) as file:
            return file.get_slice(next(iter(file.keys()))).get_shape()[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around `save_file`: a full disk is an error of its own there, and no OSError.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"cannot write {path} ({error}); free space, then run the same command again") from error


def _exits_in(path: Path) -> set[int]:
    """The exits a file of features holds; none where it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {int(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError, ValueError):  # ValueError: tensors of something else
        return set()
