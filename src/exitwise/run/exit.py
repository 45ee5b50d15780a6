"""Defines `Exit`: the layer, or set of layers, of the image encoder whose states the language model reads.

`Exit(layers=(18,))` is the state after block 18 (0: the embeddings); `Exit(layers=(3, 18, 23))` fuses three states. An
exit of one layer equals, hashes and sorts like its number, so `features[18]` and `exit <= n_blocks` work;
sets come after all single layers, ordered by size and then by their layers.
"""

import re
from collections.abc import Iterable
from functools import total_ordering
from typing import Any

STEP = 1000
"""exitwise 0.1.0 wrote a set of layers as one number, a leading 1 and three digits a layer: 1003018023 is 3+18+23."""


@total_ordering
class Exit:
    """The layers whose states leave the encoder: one, or several that are fused.

    Args:
        layers: their numbers, 0 or more; kept sorted, each once.

    Raises:
        ValueError: there is no layer, or one is negative.
    """

    __slots__ = ("layers",)
    layers: tuple[int, ...]

    def __init__(self, layers: Iterable[int]):
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise ValueError(f"Exit got {layers!r}; expected its layers, such as [3, 18], or use Exit.of({layers!r})")
        found = tuple(sorted({int(layer) for layer in layers}))
        if not found or found[0] < 0:
            raise ValueError(f"an exit got layers {found}; expected one or more, each 0 or above")
        object.__setattr__(self, "layers", found)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Exit cannot be changed (tried to set {name!r})")

    @classmethod
    def of(cls, value: "Exit | int | str") -> "Exit":
        """From an exit, a number, `"18"`, `"3+18+23"`, or the number of a set that exitwise 0.1.0 wrote.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, Exit):
            return value
        if isinstance(value, str) and value.isdecimal() and value.isascii():
            value = int(value)
        if isinstance(value, str):
            if not re.fullmatch(r"\d{1,6}(\+\d{1,6})*", value, re.ASCII):
                raise ValueError(f"{value!r} is no exit; expected a number, or numbers joined by +")
            return cls(int(layer) for layer in value.split("+"))
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{value!r} is no exit; expected a number, or numbers joined by +")
        number, layers = int(value), []
        while number >= STEP:
            number, layer = divmod(number, STEP)
            layers.append(layer)
        if layers and number != 1:
            raise ValueError(f"{value!r} is no exit; expected a number, or numbers joined by +")
        return cls(layers or [number])

    @property
    def is_set(self) -> bool:
        """Whether it fuses several layers."""
        return len(self.layers) > 1

    @property
    def deepest(self) -> int:
        """The last block that has to run."""
        return self.layers[-1]

    def to_json(self) -> int | str:
        """As JSON files hold it: 18, "3+18+23"."""
        return str(self) if self.is_set else self.layers[0]

    def __index__(self) -> int:
        if self.is_set:
            raise TypeError(f"exit {self} is a set of layers and has no single number")
        return self.layers[0]

    __int__ = __index__

    def __str__(self) -> str:
        return "+".join(map(str, self.layers))

    def __repr__(self) -> str:
        return f"Exit(layers={self.layers})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __hash__(self) -> int:
        return hash(self.layers if self.is_set else self.layers[0])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Exit):
            return self.layers == other.layers
        return self.layers == (other,) if isinstance(other, int) else NotImplemented

    def __lt__(self, other: "Exit | int") -> bool:
        if not isinstance(other, Exit | int):
            return NotImplemented
        layers = other.layers if isinstance(other, Exit) else (other,)
        return (len(self.layers), self.layers) < (len(layers), layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Exit, (self.layers,)


def encode_exit(value: object) -> int | str:
    """The `default` of `json.dumps` for values that hold exits. Raises TypeError for anything else."""
    if isinstance(value, Exit):
        return value.to_json()
    raise TypeError(f"{type(value).__name__} is not JSON")
