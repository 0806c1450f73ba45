"""Rows of logits: statistics, and a gradient from two numbers a row. Knows no loss (E1, E2)."""

from .backends import new_stats, row_backend
from .op import check_rows, token_stats
from .torch_backend import at, default_scratch, row_bytes

__all__ = [
    "at",
    "check_rows",
    "default_scratch",
    "new_stats",
    "row_backend",
    "row_bytes",
    "token_stats",
]
