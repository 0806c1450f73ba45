"""The arguments that the ops from hidden states share: checked and flattened."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _check, _dispatch
from ..rows import check_rows
from . import ops
from .tiles import Projection, make_head


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    workspace_bytes: int,
    backend: str,
    process_group: ProcessGroup | None,
    row_mask: Tensor | None = None,
) -> tuple[Projection, Tensor, Any]:
    """What the ops are given; the rows [T] that have an output; this rank's shard, if any."""
    _check.tensor("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be [..., D] with D at least 1, got {list(hidden.shape)}")
    shape, width = hidden.shape[:-1], hidden.shape[-1]
    shard = None
    if process_group is not None or hasattr(weight, "device_mesh"):
        weight, bias, low_rank, shard = _own_shard(hidden, weight, bias, low_rank, process_group)
    _check.tensor("lm_head_weight", weight, dtypes=(hidden.dtype,), like=hidden)
    num_classes = len(weight) if shard is None else shard.num_classes
    if weight.dim() != 2 or weight.shape[1] != width or num_classes == 0:
        raise ValueError(
            f"lm_head_weight must be [V, {width}] with V at least 1, got {list(weight.shape)}"
        )
    up = None
    if low_rank is not None:
        hidden, up = _check_low_rank(hidden, weight, low_rank)
    if bias is not None:
        _check.tensor("bias", bias, dtypes=(hidden.dtype,), shape=weight.shape[:1], like=hidden)
    if vocab_size is None:
        vocab_size = num_classes
    _check.integer("vocab_size", vocab_size, least=1, most=num_classes)
    _check.integer("workspace_bytes", workspace_bytes, least=1)
    if softcap is not None:
        _check.number("softcap", softcap, above=0)
    valid = check_rows(hidden, shape, targets, temperature, row_mask, vocab_size)
    per_row = isinstance(temperature, Tensor)
    projection = Projection(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        low_rank=up,
        bias=bias,
        targets=targets.reshape(-1),
        row_temperature=temperature.detach().reshape(-1) if per_row else None,
        temperature=1.0 if per_row else float(temperature),
        softcap=None if softcap is None else float(softcap),
        vocab_size=vocab_size,
        workspace_bytes=workspace_bytes,
        backend=_dispatch.resolve(backend, hidden.device),
    )
    return projection, valid.reshape(-1), shard


def served_by(shard: Any) -> tuple[Callable, Callable, Callable]:
    """Statistics, a policy's loss and a head: of one rank, or over those that share the classes."""
    if shard is None:
        return ops.token_stats, ops.policy, make_head
    from . import vocab_parallel as over

    return tuple(partial(f, shard) for f in (over.token_stats, over.policy, over.make_sharded_head))


def _own_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    process_group: ProcessGroup | None,
) -> tuple:
    from .vocab_parallel import own_shard

    if hasattr(hidden, "device_mesh"):
        raise TypeError("hidden must be a plain tensor, the same on all ranks, got a DTensor")
    inner, up = (None, None) if low_rank is None else low_rank
    weight, (bias, up), shard = own_shard(weight, {"bias": bias, "low_rank[1]": up}, process_group)
    return weight, bias, None if low_rank is None else (inner, up), shard


def _check_low_rank(
    hidden: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Hidden states with those of the low-rank term beside them [..., D + R]; its weight [V, R]."""
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        raise TypeError("low_rank must be a pair of tensors, [..., R] and [V, R]")
    inner, up = low_rank
    _check.tensor("low_rank[1]", up, dtypes=(hidden.dtype,), like=hidden)
    if up.dim() != 2 or len(up) != len(weight):
        raise ValueError(f"low_rank[1] must be [{len(weight)}, R], got {list(up.shape)}")
    shape = (*hidden.shape[:-1], up.shape[1])
    _check.tensor("low_rank[0]", inner, dtypes=(hidden.dtype,), shape=shape, like=hidden)
    return torch.cat([hidden, inner], -1), up


def check_dweight(dweight: Tensor | None, weight: Tensor) -> None:
    """A buffer for the gradient of the weight, in the dtype of its sums."""
    if dweight is None:
        return
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    _check.tensor("accumulate_dweight", dweight, dtypes=(dtype,), shape=weight.shape, like=weight)
    frozen = torch.is_grad_enabled() and not weight.requires_grad
    if frozen or dweight.requires_grad:
        raise ValueError(
            "accumulate_dweight must be a buffer without a gradient of its own, for an "
            "lm_head_weight that requires one"
        )
