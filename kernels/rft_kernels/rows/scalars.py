"""The numbers of a row: what is read off it, and what its gradient is made of."""

from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of T rows (E1), 0 where a row is not valid."""

    log_probs: Tensor  # [T]
    entropy: Tensor  # [T]
    lse: Tensor  # [T]
    saved: Tensor  # [T, k], what the backend's gradient wants back
    squares: Tensor | None = None  # [T], sum_j p_j^2, where asked for


class Slopes(NamedTuple):
    """The coefficients of a row's gradient (E2), None if 0 for all rows."""

    dlog_probs: Tensor | None = None  # [T] g
    dentropy: Tensor | None = None  # [T] h
    dlse: Tensor | None = None  # [T] l, of p_j
    squared: Tensor | None = None  # [T] q, of p_j^2

    def active(self, like: Tensor) -> Tensor:
        """Rows with a gradient, bool of the shape of `like`."""
        found = torch.zeros_like(like, dtype=torch.bool)
        for slope in self:
            if slope is not None:
                found = found | (slope != 0)
        return found
