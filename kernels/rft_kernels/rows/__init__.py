"""Rows of logits: statistics, and a gradient from a few numbers a row. Knows no loss (E1, E2)."""

from .backends import new_stats, row_backend
from .op import check_rows, sum_squared_probs, token_stats, token_stats_with_lse
from .scalars import RowStats, Slopes
from .torch_backend import at, default_scratch, row_bytes

__all__ = [
    "RowStats",
    "Slopes",
    "at",
    "check_rows",
    "default_scratch",
    "new_stats",
    "row_backend",
    "row_bytes",
    "sum_squared_probs",
    "token_stats",
    "token_stats_with_lse",
]
