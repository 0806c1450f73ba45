"""Specification of `token_loss` and `linear_token_loss`: the function of all rows, and autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..results import PolicyLoss
from .linear import logits_of
from .token_stats import token_stats_with_lse


def token_loss(
    logits: Tensor,
    targets: Tensor,
    loss_fn: Callable,
    *,
    tokens: tuple[Tensor, ...] = (),
    mask: Tensor | None = None,
    normalizer: float | Tensor,
    with_lse: bool = False,
    **options: Any,
) -> PolicyLoss:
    """The losses of the rows in the loss, gathered; `options` are those of `token_stats`."""
    found = token_stats_with_lse(logits, targets, **options)
    inside = targets != -100
    if mask is not None:
        inside = inside & mask
    stats = found if with_lse else found[:2]
    result = loss_fn(*(x[inside] for x in (*stats, *tokens)))
    losses, metrics = result if isinstance(result, tuple) else (result, {})
    metrics = metrics | {
        "num_tokens": torch.ones_like(losses),
        "entropy_sum": found.entropy[inside],
    }
    sums = {name: value.detach().to(losses.dtype).sum() for name, value in metrics.items()}
    log_probs, entropy = (x.detach() for x in found[:2])
    return PolicyLoss(losses.sum() / normalizer, log_probs, entropy, None, sums)


def linear_token_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *inputs: Any,
    bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> PolicyLoss:
    """`token_loss` of the logits; `inputs` and `options` are those of `token_loss`."""
    return token_loss(logits_of(hidden, lm_head_weight, bias, softcap), *inputs, **options)
