"""Nested dicts, as TOML gives them, to nested dataclasses, with errors a person can act on."""

import dataclasses
import difflib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prefix_rft.checks import ConfigError

Root = TypeVar("Root")
TYPE_TEXTS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "none",
}


def dataclass_from_dict(root: type[Root], values: dict[str, Any]) -> Root:
    """An instance of the dataclass `root`; fields that are absent keep their defaults.

    Fields are str, int, float, bool, dict[str, ...], tuples of fixed length, literals, dataclasses,
    or unions of these; nothing is converted but int to float and list to tuple.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    for key in _unknown_keys(values, root, ""):
        raise ConfigError(f"unknown key {key!r}; did you mean {_nearest(key, root)!r}?")
    return _typed(values, root, "")


def _unknown_keys(values: dict[str, Any], section: type, prefix: str) -> Iterator[str]:
    types = get_type_hints(section)
    for key, value in values.items():
        if key not in types:
            yield prefix + key
        elif dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            yield from _unknown_keys(value, types[key], f"{prefix}{key}.")


def _typed(value: Any, expected: Any, key: str) -> Any:
    arguments = get_args(expected)
    kind = get_origin(expected) or expected
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types, prefix = get_type_hints(kind), f"{key}." if key else ""
        return kind(**{name: _typed(v, types[name], prefix + name) for name, v in value.items()})
    if kind in (Union, UnionType):
        for option in arguments:
            try:
                return _typed(value, option, key)
            except ConfigError:
                continue
    elif kind is Literal and value in arguments:
        return value
    elif kind is tuple and isinstance(value, (list, tuple)) and arguments[-1] is Ellipsis:
        return tuple(_typed(v, arguments[0], key) for v in value)
    elif kind is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_typed(v, option, key) for v, option in zip(value, arguments, strict=True))
    elif kind is dict and isinstance(value, dict):
        return {name: _typed(v, arguments[1], f"{key}.{name}") for name, v in value.items()}
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise ConfigError(f"{key}: expected {_type_text(expected)}, got {value!r}")


def _type_text(expected: Any) -> str:
    arguments = get_args(expected)
    kind = get_origin(expected) or expected
    if kind in (Union, UnionType):
        return " or ".join(map(_type_text, arguments))
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind is tuple:
        arguments = [option for option in arguments if option is not Ellipsis]
        return f"[{', '.join(map(_type_text, arguments))}]"
    if dataclasses.is_dataclass(kind) or kind is dict:
        return "a table"
    return TYPE_TEXTS[kind]


def _nearest(unknown: str, root: type) -> str:
    """The known dotted key most like `unknown`; one with the same last word goes first."""
    known = list(_dotted_keys(root, ""))
    same_word = [key for key in known if key.split(".")[-1] == unknown.split(".")[-1]]
    return difflib.get_close_matches(unknown, same_word or known, n=1, cutoff=0.0)[0]


def _dotted_keys(section: type, prefix: str) -> Iterator[str]:
    for key, expected in get_type_hints(section).items():
        yield prefix + key
        if dataclasses.is_dataclass(expected):
            yield from _dotted_keys(expected, f"{prefix}{key}.")
