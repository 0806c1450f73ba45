"""The methods by name: those of this package, and one's own."""

import importlib
from collections.abc import Iterable
from typing import TypeVar

from prefix_rft.checks import ConfigError
from prefix_rft.methods.chord import CHORD
from prefix_rft.methods.hpt import HPT
from prefix_rft.methods.luffy import LUFFY
from prefix_rft.methods.method import Chart, Method
from prefix_rft.methods.prefix_rft import PrefixRFT
from prefix_rft.methods.relift import ReLIFT
from prefix_rft.methods.rft import RFT
from prefix_rft.methods.rl_sft_loss import RLSFTLoss
from prefix_rft.methods.sft import SFT
from prefix_rft.methods.srft import SRFT
from prefix_rft.methods.uft import UFT

AnyMethod = TypeVar("AnyMethod", bound=type[Method])
Declared = TypeVar("Declared")

_SHIPPED = (PrefixRFT, RFT, SFT, RLSFTLoss, LUFFY, ReLIFT, HPT, UFT, CHORD, SRFT)
METHODS: dict[str, type[Method]] = {method.name: method for method in _SHIPPED}
DEFAULT_METHOD = PrefixRFT.name


def register(method: AnyMethod) -> AnyMethod:
    """Makes a class of one's own known by its `name`; usable as a decorator."""
    known = METHODS.setdefault(method.name, method)
    if known is not method:
        raise ValueError(f"name: {method.name!r} is already that of {known.__qualname__}")
    return method


def find_method(name: str) -> type[Method]:
    """The method of that name, or at "package.module:Class", which it registers.

    Raises:
        ConfigError: there is none.
    """
    if ":" not in name:
        if name in METHODS:
            return METHODS[name]
        raise ConfigError(
            f"method.name: expected one of {', '.join(METHODS)}, or package.module:Class, "
            f"got {name!r}"
        )
    module_name, _, class_name = name.partition(":")
    try:
        method = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.name: {name!r} cannot be imported: {error}") from error
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ConfigError(f"method.name: expected a subclass of Method, got {name!r}")
    return register(method)


def declared_charts() -> list[Chart]:
    """The charts of all methods; one that has no values in a run is not drawn there."""
    return _once(chart for method in METHODS.values() for chart in method.charts)


def declared_progress() -> list[tuple[str, tuple[tuple[str, str, str], ...]]]:
    """The console's lines of all methods, as (label, figures)."""
    return _once(line for method in METHODS.values() for line in method.progress.items())


def _once(declared: Iterable[Declared]) -> list[Declared]:
    """Methods may have inherited the same."""
    found: list[Declared] = []
    for each in declared:
        if each not in found:
            found.append(each)
    return found
