"""How exits are named and written: bands, ranges, and the words of `--exits`. No torch here."""

import re
from collections.abc import Iterable

from ..errors import UserError

BANDS = ("early", "middle", "late")
STEP = 1000  # more layers than an encoder has


def fused(layers: Iterable[int]) -> int:
    """The number of an exit that is a set of layers: 3+18+23 is 1003018023, so that records keep one integer an exit.

    Above every exit of a single layer, the same in every run, and read back by `layers_of`.
    """
    number = 1
    for layer in sorted(set(layers)):
        number = number * STEP + layer
    return number


def layers_of(exit: int) -> tuple[int, ...]:
    """The layers of an exit: itself, or those that `fused` put together."""
    layers: list[int] = []
    while exit >= STEP:
        exit, layer = divmod(exit, STEP)
        layers.insert(0, layer)
    return tuple(layers) or (exit,)


def is_fused(exit: int) -> bool:
    return exit >= STEP


def name_of(exit: int) -> str:
    """An exit as people write it: "18", "3+18+23"."""
    return "+".join(map(str, layers_of(exit)))


def band_of(exit: int, n_blocks: int) -> str:
    """ "embeddings" for exit 0, else the third of the encoder that exit 1 ... n_blocks ends in.

    For 24 blocks early is 1-8, middle 9-16, late 17-24, the bands of Bachu et al. (2025). A fused exit is in none.
    """
    if is_fused(exit):
        return "fused"
    return "embeddings" if exit == 0 else BANDS[min((exit * 3 - 1) // n_blocks, 2)]


def band_exits(band: str, n_blocks: int) -> tuple[int, ...]:
    """The exits of a band."""
    return tuple(exit for exit in range(1, n_blocks + 1) if band_of(exit, n_blocks) == band)


def thirds(n_blocks: int) -> dict[str, tuple[int, ...]]:
    """The bands by name, where a run names no others."""
    return {band: band_exits(band, n_blocks) for band in BANDS}


def ranges(exits: Iterable[int]) -> str:
    """Exits as people write them: "0-9, 12, 3+18+23"."""
    runs: list[list[int]] = []
    for exit in sorted(exits):
        if runs and exit == runs[-1][-1] + 1 and not is_fused(exit):
            runs[-1].append(exit)
        else:
            runs.append([exit])
    return ", ".join(name_of(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def parse_exits(text: str, n_blocks: int, default_exit: int, flag: str = "--exits") -> tuple[int, ...]:
    """`all`, `default`, `early`, `middle`, `late`, numbers and ranges, separated by commas: `default,0-3,late`.

    Layers joined by + are one exit that fuses them (`3+18+23`, see `fused`).

    Args:
        flag: that gave the text, for messages.

    Raises:
        UserError: a word is none of these, or an exit lies outside 0 .. n_blocks.
    """
    found: set[int] = set()
    for word in (w.strip() for w in text.split(",")):
        if word == "all":
            found |= set(range(n_blocks + 1))
        elif word == "default":
            found.add(default_exit)
        elif word in BANDS:
            found |= set(band_exits(word, n_blocks))
        elif match := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word, re.ASCII):
            low, high = int(match[1]), int(match[2] or match[1])
            if not low <= high <= n_blocks:
                raise UserError(
                    f"exit {word} is not there: the encoder has exits 0 to {n_blocks} (default {default_exit})"
                )
            found |= set(range(low, high + 1))
        elif re.fullmatch(r"\d{1,3}(\+\d{1,3})+", word, re.ASCII):
            layers = [int(layer) for layer in word.split("+")]
            if max(layers) > n_blocks or len(set(layers)) < len(layers):
                raise UserError(
                    f"{flag} got {word!r}; expected different layers of 0 to {n_blocks}, joined by + (default "
                    f"{default_exit})"
                )
            found.add(fused(layers))
        else:
            raise UserError(
                f"{flag} got {word!r}; expected all, default, early, middle, late, numbers or ranges "
                f"(0 to {n_blocks}), separated by commas; layers to fuse joined by +"
            )
    return tuple(sorted(found))
