"""The ops from hidden states as the trainers call their heads: under autocast, dtypes mixed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from .. import adapters
from ..linear import linear_token_loss, linear_token_stats, linear_token_stats_with_lse
from ..objective import LossFn
from ..results import LseStats, PolicyLoss, TokenStats, stats_dtype

TILE_ROWS = 256  # of logits that are made for what the ops do not give


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply `hidden` here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def head_stats(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """`linear_token_stats`, weight and bias cast to the dtype of the product.

    A DTensor is refused: the trainers' are sharded by FSDP, under which hidden states differ by
    rank, and not by classes.
    """
    return _call(
        linear_token_stats,
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        process_group=process_group,
    )


def head_stats_with_lse(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> LseStats:
    """`linear_token_stats_with_lse`, as `head_stats`."""
    return _call(linear_token_stats_with_lse, hidden, weight, targets, **options)


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: LossFn, **options: Any
) -> PolicyLoss:
    """`linear_token_loss` with lse, over 1, as `head_stats`."""
    options |= {"normalizer": 1.0, "with_lse": True}
    return _call(linear_token_loss, hidden, weight, targets, loss_fn, **options)


def _call(
    op: Any,
    hidden: Tensor,
    weight: Tensor,
    *arguments: Any,
    bias: Tensor | None = None,
    **options: Any,
) -> Any:
    if isinstance(weight, DTensor):
        raise TypeError("the head's weight must be a plain tensor, got a DTensor: gather it first")
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return op(
            hidden.to(dtype),
            weight.to(dtype),
            *arguments,
            bias=None if bias is None else bias.to(dtype),
            workspace_bytes=adapters.workspace_bytes,
            **options,
        )


@torch.no_grad()
def logits_by_tiles(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
) -> Iterator[Tensor]:
    """The logits, TILE_ROWS at a time, without a gradient: one projection more."""
    dtype = compute_dtype(hidden)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for rows in hidden.split(TILE_ROWS):
        yield torch.nn.functional.linear(rows.to(dtype), weight, bias).to(stats_dtype(dtype))


def argmax_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The likeliest class of every row, [T] int64."""
    return torch.cat([z.argmax(-1) for z in logits_by_tiles(hidden, weight, bias)])
