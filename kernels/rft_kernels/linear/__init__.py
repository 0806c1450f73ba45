"""Hidden states to statistics or loss, the logits a tile of rows at a time (E9 to E11)."""

from .losses import linear_prefix_rft_loss, linear_token_loss
from .stats import linear_token_stats, linear_token_stats_with_lse

__all__ = [
    "linear_prefix_rft_loss",
    "linear_token_loss",
    "linear_token_stats",
    "linear_token_stats_with_lse",
]
