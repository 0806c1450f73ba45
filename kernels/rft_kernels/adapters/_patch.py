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


def install(library: str, replacements: dict[str, Callable]) -> Patch:
    """Replaces `"module:name"` or `"module:Class.name"` by functions of ours; all or none.

    A module that did `from x import name` holds the function itself, so every loaded module of
    the library, and the classes named, are searched for it.

    Raises:
        ImportError: the library, or one of the names, is missing.
        RuntimeError: patched already.
    """
    pairs = []
    for place, ours in replacements.items():
        theirs = _find(library, place)
        if theirs is ours:
            raise RuntimeError(f"{place} is patched already; undo the first patch before another")
        pairs.append((theirs, ours))
    return Patch(library, pairs)


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
