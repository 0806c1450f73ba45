"""`linear_token_stats` as the trainers call their heads: under autocast, with mixed dtypes."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from .. import adapters
from ..linear import linear_token_stats
from ..results import TokenStats


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
    if isinstance(weight, DTensor):
        raise TypeError("the head's weight must be a plain tensor, got a DTensor: gather it first")
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_token_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=None if bias is None else bias.to(dtype),
            temperature=temperature,
            softcap=softcap,
            workspace_bytes=adapters.workspace_bytes,
            process_group=process_group,
        )
