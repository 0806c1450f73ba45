"""What is refused, and how: one line that names the argument, what was expected, what came."""

import dataclasses
from collections.abc import Callable
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

Section = TypeVar("Section")
Fraction = Annotated[float, Field(ge=0, le=1, description="a fraction in [0, 1]")]

_TEXTS: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "none",
    Any: "any value",
    ...: "...",
}
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


class UserError(Exception):
    """Something the person at the keyboard can put right; the command line prints it as one line.

    Not a ValueError: argument parsers catch those and bury the text in their own.
    """


class ConfigError(UserError):
    """A configuration that cannot run; the message names the key, what was expected, what came."""


def require(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_section(key: str = "") -> Callable[[type[Section]], type[Section]]:
    """Make a frozen dataclass whose values pydantic checks against their annotations.

    Nothing is converted but an int to a float, and a list to a tuple. NaN and infinities are
    refused.

    Args:
        key: the section's, for error messages; "": the whole configuration. The class keeps it.
    """
    options = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def make(cls: type[Section]) -> type[Section]:
        made = dataclass(frozen=True, kw_only=True, config=options)(cls)
        init = made.__init__

        def checked_init(self: Section, **values: Any) -> None:
            as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            try:
                init(self, **as_tuples)
            except ValidationError as error:
                name = error.errors()[0]["loc"][0]
                full_name = f"{key}.{name}" if key else name
                hints = get_type_hints(made, include_extras=True)
                if name not in hints:
                    raise ConfigError(f"unknown key {full_name!r}") from None
                require(False, full_name, describe(hints[name]), values.get(name))

        made.__init__ = checked_init
        made.key = key
        return made

    return make


def describe(annotation: Any) -> str:
    """The values that the annotation of a field allows, in words."""
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        bare, *extras = arguments
        texts = [text for text in (getattr(extra, "description", None) for extra in extras) if text]
        return texts[0] if texts else " ".join([describe(bare), *map(_bounds, extras)])
    if kind in (Union, UnionType):
        return " or ".join(map(describe, arguments))
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind is tuple:
        return f"[{', '.join(map(describe, arguments))}]"
    if kind is dict:
        return f"a table of {describe(arguments[1]).removeprefix('a ')}s"
    return _TEXTS.get(kind, "a table")


def _bounds(extra: Any) -> str:
    """The bounds of a pydantic `Field`, or of a constraint as `PositiveInt` has it."""
    constraints = map(dataclasses.asdict, getattr(extra, "metadata", [extra]))
    return " and ".join(f"{_BOUNDS[k]} {v}" for bound in constraints for k, v in bound.items())
