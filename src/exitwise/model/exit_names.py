"""Names of exits: the words and ranges of `--exits`, and the bands early, middle and late. Imports no torch."""

import re
from collections.abc import Iterable

from ..errors import UserError
from ..run.exit import Exit

BANDS = ("early", "middle", "late")


def band_of(exit: Exit | int, n_blocks: int) -> str:
    """ "embeddings" for exit 0, else the third of the encoder that exit 1 ... n_blocks ends in.

    For 24 blocks early is 1-8, middle 9-16, late 17-24, the bands of Bachu et al. (2025). A fused exit is in none.
    """
    exit = Exit.of(exit)
    if exit.is_set:
        return "fused"
    return "embeddings" if exit == 0 else BANDS[min((exit.deepest * 3 - 1) // n_blocks, 2)]


def band_exits(band: str, n_blocks: int) -> tuple[Exit, ...]:
    """The exits of a band."""
    return tuple(Exit([exit]) for exit in range(1, n_blocks + 1) if band_of(exit, n_blocks) == band)


def thirds(n_blocks: int) -> dict[str, tuple[Exit, ...]]:
    """The bands by name, where a run names no others."""
    return {band: band_exits(band, n_blocks) for band in BANDS}


def ranges(exits: Iterable[Exit | int]) -> str:
    """Exits as people write them: "0-9, 12, 3+18+23"."""
    runs: list[list[Exit]] = []
    for exit in sorted(map(Exit.of, exits)):
        if runs and not exit.is_set and exit.deepest == runs[-1][-1].deepest + 1:
            runs[-1].append(exit)
        else:
            runs.append([exit])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def parse_exits(text: str, n_blocks: int, default_exit: Exit | int, flag: str = "--exits") -> tuple[Exit, ...]:
    """`all`, `default`, `early`, `middle`, `late`, numbers and ranges, separated by commas: `default,0-3,late`.

    Layers joined by + are one exit that fuses them (`3+18+23`).

    Args:
        flag: that gave the text, for messages.

    Raises:
        UserError: a word is none of these, or an exit lies outside 0 .. n_blocks.
    """
    found: set[Exit] = set()
    for word in (w.strip() for w in text.split(",")):
        if word == "all":
            found |= {Exit([layer]) for layer in range(n_blocks + 1)}
        elif word == "default":
            found.add(Exit.of(default_exit))
        elif word in BANDS:
            found |= set(band_exits(word, n_blocks))
        elif match := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word, re.ASCII):
            low, high = int(match[1]), int(match[2] or match[1])
            if not low <= high <= n_blocks:
                raise UserError(
                    f"exit {word} does not exist: the encoder has exits 0 to {n_blocks} (default {default_exit})"
                )
            found |= {Exit([layer]) for layer in range(low, high + 1)}
        elif re.fullmatch(r"\d{1,3}(\+\d{1,3})+", word, re.ASCII):
            layers = [int(layer) for layer in word.split("+")]
            if max(layers) > n_blocks or len(set(layers)) < len(layers):
                raise UserError(
                    f"{flag} got {word!r}; expected different layers of 0 to {n_blocks}, joined by + (default "
                    f"{default_exit})"
                )
            found.add(Exit(layers))
        else:
            raise UserError(
                f"{flag} got {word!r}; expected all, default, early, middle, late, numbers or ranges "
                f"(0 to {n_blocks}), separated by commas; layers to fuse joined by +"
            )
    return tuple(sorted(found))
