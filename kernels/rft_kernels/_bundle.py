"""Ops of torch that take named tuples, flattened at the boundary of the op and nowhere else.

A schema of torch knows tensors, numbers and text, one parameter each. It is read off the
annotations of the function and of its bundles, whose fields keep their names.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_type_hints

import torch

from ._ops import add_op_namespace_prefix


def flatten(arguments: Sequence[Any]) -> list[Any]:
    """The arguments, and in place of a bundle its fields."""
    return [x for value in arguments for x in (value if isinstance(value, tuple) else (value,))]


class BundledOp:
    """A function whose arguments may be bundles, registered as an op of torch."""

    def __init__(self, name: str, function: Callable, mutates_args: Iterable[str] = ()) -> None:
        hints = get_type_hints(function)
        hints.pop("return")
        self._kinds = list(hints.values())
        fields: dict[str, Any] = {}
        for argument, kind in hints.items():
            fields |= get_type_hints(kind) if hasattr(kind, "_fields") else {argument: kind}

        def flat(*values: Any) -> Any:
            return function(*self.bundle(values))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        flat.__signature__ = inspect.Signature(
            [inspect.Parameter(field, kind, annotation=hint) for field, hint in fields.items()],
            return_annotation=inspect.signature(function).return_annotation,
        )
        self._op = torch.library.custom_op(
            add_op_namespace_prefix(name), flat, mutates_args=tuple(mutates_args)
        )
        self.register_autograd = self._op.register_autograd

    def bundle(self, values: Sequence[Any]) -> list[Any]:
        """The function's arguments from those of the op."""
        left = iter(values)
        return [
            kind(*(next(left) for _ in kind._fields)) if hasattr(kind, "_fields") else next(left)
            for kind in self._kinds
        ]

    def register_fake(self, function: Callable) -> None:
        self._op.register_fake(lambda *values: function(*self.bundle(values)))

    def __call__(self, *arguments: Any) -> Any:
        return self._op(*flatten(arguments))


def bundled_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable], BundledOp]:
    """Decorator: `BundledOp` of the function."""
    return lambda function: BundledOp(name, function, mutates_args)
