"""The specification: every op in plain torch, everything materialised, gradients by autograd."""

from .linear import linear_prefix_rft_loss, linear_token_stats
from .objective import policy_objective
from .policy_loss import prefix_rft_loss
from .selection import select_top_entropy
from .token_loss import linear_token_loss, token_loss
from .token_stats import token_stats

__all__ = [
    "linear_prefix_rft_loss",
    "linear_token_loss",
    "linear_token_stats",
    "policy_objective",
    "prefix_rft_loss",
    "select_top_entropy",
    "token_loss",
    "token_stats",
]
