"""Putting functions in place of another library's, wherever it holds them, and back."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any


class Patch:
    """Functions put in place of a library's; `undo()`, or the end of a `with` block, reverts."""

    def __init__(self, library: str, pairs: list[tuple[Any, Any]]) -> None:
        self._library, self._pairs = library, pairs
        for theirs, ours in pairs:
            _replace(library, theirs, ours)

    def undo(self) -> None:
        """The library's own functions again, in modules imported meanwhile too."""
        for theirs, ours in self._pairs:
            _replace(self._library, ours, theirs)
        self._pairs = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def refusing(module: str, reasons: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`, which refuses the names of a library that are not served here."""

    def getattr_of_module(name: str) -> Any:
        if name in reasons:
            raise NotImplementedError(f"{name} is not served by {module}: {reasons[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_of_module


def install(
    library: str, replacements: dict[str, Callable], optional: dict[str, Callable] | None = None
) -> Patch:
    """Replaces `"module:name"` or `"module:Class.name"` by functions of ours; all or none.

    `optional`: of these the ones that the library has, as it may depend on what it runs on.

    A module that did `from x import name` holds the function itself, so every loaded module of
    the library, and the classes named, are searched for it.

    Raises:
        ImportError: the library, or one of the names, is missing.
        RuntimeError: patched already.
    """
    pairs = []
    there = {place: ours for place, ours in (optional or {}).items() if _has(place)}
    for place, ours in (replacements | there).items():
        theirs = _find(library, place)
        if theirs is ours:
            raise RuntimeError(f"{place} is patched already; undo the first patch before another")
        pairs.append((theirs, ours))
    return Patch(library, pairs)


def _has(place: str) -> bool:
    module, _, name = place.partition(":")
    return hasattr(sys.modules.get(module), name)


def _find(library: str, place: str) -> Any:
    module, _, name = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"cannot patch {place}: {error}; is a version of {library} with it installed?"
        ) from error
    return found


def _replace(library: str, old: Any, new: Any) -> None:
    owners: list[ModuleType | type] = [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] == library
    ]
    owners += {
        id(value): value
        for module in owners
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.partition(".")[0] == library
    }.values()
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if value is old:
                setattr(owner, name, new)
