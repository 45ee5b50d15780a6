"""Options of a command as flat keywords: makes nested configs of them, and the flat fields of config.json.

A config is a frozen dataclass; a field of it may be another config. No two of them share the name of an option, so the
command line, the keywords of the API and config.json need no prefixes.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..run.directory import plain
from ..run.exit import Exit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
WORDS: dict[object, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def make_config(kind: type[C], options: Mapping[str, object]) -> C:
    """A config from flat keywords; each goes to the config that has a field of its name, at any depth.

    Text stands for a path, one value for a tuple of one, and a whole number for a float or for text (`exits=8`).

    Raises:
        UserError: an unknown option, or a value of another type.
    """
    known = option_types(kind)
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
            raise UserError(f"there is no option {name!r}; {hint}")
    return _build(kind, {name: _convert(name, value, known[name]) for name, value in options.items()})


def option_types(kind: type) -> dict[str, object]:
    """{option: its type}, the options of contained configs in the place of these."""
    found: dict[str, object] = {}
    for name, hint in _types(kind).items():
        found |= option_types(hint) if isinstance(hint, type) and is_dataclass(hint) else {name: hint}
    return found


def to_json(config: "DataclassInstance") -> dict[str, object]:
    """{option: value as JSON holds it}, flat, in the order of the fields."""
    found: dict[str, object] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= to_json(value) if is_dataclass(value) and not isinstance(value, type) else {field.name: plain(value)}
    return found


def _types(kind: type) -> dict[str, object]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in (field.name for field in fields(kind))}


def _build(kind: type[C], options: Mapping[str, object]) -> C:
    values: dict[str, object] = {}
    for name, hint in _types(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            values[name] = _build(hint, options)
        elif name in options:
            values[name] = options[name]
    return kind(**values)


def _convert(name: str, value: object, hint: object) -> object:
    """The value as the field holds it; raises UserError for a value of another type."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return None if value is None else _convert(name, value, parts[0])
    if get_origin(hint) is Literal:
        if value not in parts:
            raise UserError(f"{name} got {value!r}; expected one of: {', '.join(map(str, parts))}")
        return value
    if get_origin(hint) is tuple:
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        if parts[-1] is not Ellipsis and len(items) != len(parts):
            raise UserError(f"{name} got {value!r}; expected {len(parts)} values")
        return tuple(_convert(name, item, parts[0]) for item in items)
    if isinstance(value, Exit) and hint is str:
        return str(value)
    if isinstance(value, str | PathLike) and hint in (str, Path):
        return Path(value) if hint is Path else fspath(value)
    if isinstance(value, int) and not isinstance(value, bool) and hint in (int, float, str):
        return value if hint is int else float(value) if hint is float else str(value)
    if (hint is bool and isinstance(value, bool)) or (hint is float and isinstance(value, float)):
        return value
    raise UserError(f"{name} got {value!r}; expected {WORDS[hint]}")
