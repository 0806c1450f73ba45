"""Statistics, selection, loss and gradient for reinforcement fine-tuning of language models."""

from .function_loss import token_loss
from .linear import (
    linear_prefix_rft_loss,
    linear_token_loss,
    linear_token_stats,
    linear_token_stats_with_lse,
)
from .lm_head import LMHead, patch_lm_head
from .objective import PolicyConfig, policy_objective
from .policy_loss import prefix_rft_loss
from .results import LseStats, PolicyLoss, TokenStats
from .rows import sum_squared_probs, token_stats, token_stats_with_lse
from .selection import select_top_entropy

__all__ = [
    "LMHead",
    "LseStats",
    "PolicyConfig",
    "PolicyLoss",
    "TokenStats",
    "linear_prefix_rft_loss",
    "linear_token_loss",
    "linear_token_stats",
    "linear_token_stats_with_lse",
    "patch_lm_head",
    "policy_objective",
    "prefix_rft_loss",
    "select_top_entropy",
    "sum_squared_probs",
    "token_loss",
    "token_stats",
    "token_stats_with_lse",
]
