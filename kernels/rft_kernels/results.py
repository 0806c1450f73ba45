"""What the ops return, and in which dtype."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What the policy thinks of each token: both `[...]`, float32 (float64 for float64 logits)."""

    log_probs: Tensor  # log-probability of the target, nats
    entropy: Tensor  # entropy of the whole distribution, nats


class LseStats(NamedTuple):
    """As `TokenStats`, and the logarithm of what the softmax divides by."""

    log_probs: Tensor  # log-probability of the target, nats
    entropy: Tensor  # entropy of the whole distribution, nats
    lse: Tensor  # log sum_j e^(z_j), z the logits after softcap and temperature


class PolicyLoss(NamedTuple):
    """The loss, and what it was computed from, detached."""

    loss: Tensor  # 0-dim, float32 (float64 for float64 inputs), differentiable
    log_probs: Tensor  # [...] nats, 0 without a target
    entropy: Tensor  # [...] nats, 0 without a target
    selected_mask: Tensor | None  # [...] bool, prefix tokens in the loss (unless dropped there)
    metrics: dict[str, Tensor]  # as `policy_objective` gives them


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and sums over inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
