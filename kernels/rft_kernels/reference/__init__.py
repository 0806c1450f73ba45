"""The specification: every op in plain torch, everything materialised, gradients by autograd."""

from .linear import linear_prefix_rft_loss, linear_token_stats, linear_token_stats_with_lse
from .objective import policy_objective
from .policy_loss import prefix_rft_loss
from .selection import select_top_entropy
from .token_loss import linear_token_loss, token_loss
from .token_stats import sum_squared_probs, token_stats, token_stats_with_lse

__all__ = [
    "linear_prefix_rft_loss",
    "linear_token_loss",
    "linear_token_stats",
    "linear_token_stats_with_lse",
    "policy_objective",
    "prefix_rft_loss",
    "select_top_entropy",
    "sum_squared_probs",
    "token_loss",
    "token_stats",
    "token_stats_with_lse",
]
