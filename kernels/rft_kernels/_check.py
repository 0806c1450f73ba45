"""Argument checks of the public functions: TypeError or ValueError, never a device read."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)
NO_TARGET = -100


def tensor(
    name: str,
    value: Any,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    shape: Sequence[int] | None = None,
    like: Tensor | None = None,
) -> None:
    """Refuses all but a tensor of one of `dtypes`, of `shape`, on the device of `like`.

    `dtypes` None: any float; (): any.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if dtypes is None and not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if dtypes and value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    if shape is not None and value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")


def mask(name: str, value: Any, like: Tensor) -> None:
    tensor(name, value, dtypes=(torch.bool,), shape=like.shape, like=like)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    may_be_infinite: bool = False,
) -> None:
    """Refuses all but a real number (no bool, no NaN) within the bounds."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and not value <= most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    if math.isnan(value) or (math.isinf(value) and not may_be_infinite):
        raise ValueError(f"{name} must be finite, got {value}")


def integer(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def readable(value: Tensor) -> bool:
    """Whether values may be looked at: on the host, and not while a graph is traced."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def rows(name: str, value: Any, like: Tensor) -> None:
    """Indices [N] into the flattened `like`, each once."""
    tensor(name, value, dtypes=(torch.int64,), like=like)
    if value.dim() != 1:
        raise ValueError(f"{name} must have shape [N], got {list(value.shape)}")
    if readable(value) and value.numel():
        least, most = (int(x) for x in value.aminmax())
        if least < 0 or most >= like.numel() or value.bincount().amax() > 1:
            raise ValueError(
                f"{name} must be different indices between 0 and {like.numel() - 1}, "
                f"got {value.tolist() if value.numel() <= 8 else f'{least} to {most}'}"
            )


def targets(value: Tensor, valid: Tensor, vocab_size: int) -> None:
    """Where `valid`, targets are classes."""
    if readable(value):
        wrong = valid & ((value < 0) | (value >= vocab_size))
        if wrong.any():
            raise ValueError(
                f"targets must be {NO_TARGET} or between 0 and {vocab_size - 1}, "
                f"got {int(value[wrong][0])}"
            )


def temperature(value: Any, like: Tensor, valid: Tensor) -> None:
    """A number, or one value a row, above zero and finite in rows that are `valid`."""
    if not isinstance(value, Tensor):
        return number("temperature", value, above=0)
    tensor("temperature", value, shape=valid.shape, like=like)
    if readable(value):
        wrong = valid & ~((value > 0) & value.isfinite())
        if wrong.any():
            raise ValueError(
                f"temperature must be greater than 0 and finite, got {float(value[wrong][0])}"
            )


def normalizer(value: Any) -> None:
    if not isinstance(value, Tensor):
        return number("normalizer", value, above=0)
    if value.dim() != 0:
        raise ValueError(f"normalizer must be a number or 0-dim, got shape {list(value.shape)}")
    if readable(value) and not 0 < value < math.inf:
        raise ValueError(f"normalizer must be greater than 0 and finite, got {value.item()}")


def cu_seqlens(value: Any, num_tokens: int, like: Tensor) -> None:
    """[B + 1] integers: 0, ..., num_tokens, none smaller than the one before."""
    tensor("cu_seqlens", value, dtypes=INTEGERS, like=like)
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {list(value.shape)}")
    if readable(value):
        ends = (int(value[0]), int(value[-1]))
        if ends != (0, num_tokens) or (value.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, "
                f"got {value.tolist() if value.numel() <= 8 else f'{ends[0]} ... {ends[1]}'}"
            )
