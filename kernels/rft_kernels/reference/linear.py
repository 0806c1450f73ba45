"""Specification of the ops from hidden states: all logits first, then the ops from logits (E9)."""

from typing import Any

import torch
from torch import Tensor

from ..results import LseStats, PolicyLoss, TokenStats
from .policy_loss import prefix_rft_loss
from .token_stats import token_stats_with_lse


def logits_of(
    hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, lm_head_weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_token_stats(hidden: Tensor, *arguments: Tensor, **options: Any) -> TokenStats:
    """`token_stats` of hidden @ lm_head_weight.T + bias; `options` are those of `token_stats`."""
    return TokenStats(*linear_token_stats_with_lse(hidden, *arguments, **options)[:2])


def linear_token_stats_with_lse(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    **options: Any,
) -> LseStats:
    logits = logits_of(hidden, lm_head_weight, bias, softcap)
    return token_stats_with_lse(logits, targets, **options)


def linear_prefix_rft_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *loss_inputs: Tensor | None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    **options: Any,
) -> PolicyLoss:
    """`prefix_rft_loss` of those logits; inputs and `options` are those of `prefix_rft_loss`."""
    logits = logits_of(hidden, lm_head_weight, bias, softcap)
    return prefix_rft_loss(logits, *loss_inputs, **options)
