"""JSON objects as dataclasses and back, by msgspec; exits become `Exit` values."""

from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from ..errors import UserError
from .exit import Exit

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
T = TypeVar("T")


def _decode(kind: type, value: object) -> object:
    if kind is Exit:
        return Exit.of(value)  # type: ignore[arg-type]  # a wrong type raises ValueError, which msgspec reports
    raise NotImplementedError(kind)


def _encode(value: object) -> int | str:
    if isinstance(value, Exit):
        return value.to_json()
    raise NotImplementedError(type(value))


def from_json(value: object, kind: type[T], path: Path, advice: str) -> T:
    """`value`, read from `path`, as a `kind`; keys that `kind` lacks are passed over.

    Raises:
        UserError: a key is missing or holds another type; the message names the file, the key and `advice`.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} does not have the format of a run ({error}); {advice}") from None


def to_json(value: object) -> dict[str, Json]:
    """A dataclass as a JSON object, keys in the order of its fields; fields that are UNSET are left out."""
    return msgspec.to_builtins(value, enc_hook=_encode)
