"""The two vocabulary-sized primitives, by name of the backend.

A backend is a module with two functions and a constant, and that is all it is asked for:

- `row_stats(logits, targets, valid, temperature, softcap, scratch_bytes, squares=False)`
  -> `RowStats`, whose `saved` [T, NUM_SAVED] is what its `row_grad` wants back;
- `row_grad(out, logits, targets, temperature, softcap, entropy, saved, slopes, scratch_bytes)`
  writes the gradient of the logits into `out`, which may be `logits`.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..results import stats_dtype
from . import torch_backend
from .scalars import RowStats


def row_backend(name: str) -> ModuleType:
    if name == "torch":
        return torch_backend
    from . import triton_backend

    return triton_backend


def new_stats(like: Tensor, num_rows: int, num_saved: int) -> RowStats:
    """Zeros [T], and [T, num_saved] for what the gradient wants back."""
    log_probs = like.new_zeros(num_rows, dtype=stats_dtype(like.dtype))
    saved = log_probs.new_zeros(num_rows, num_saved)
    return RowStats(log_probs, torch.zeros_like(log_probs), torch.zeros_like(log_probs), saved)
