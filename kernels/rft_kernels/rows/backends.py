"""The two vocabulary-sized primitives, by name of the backend.

A backend is a module with two functions and a constant, and that is all it is asked for:

- `row_stats(logits, targets, valid, temperature, softcap, scratch_bytes)`
  -> `(log_probs, entropy, saved)`, `saved` [T, NUM_SAVED] being what its `row_grad` wants back;
- `row_grad(out, logits, targets, temperature, softcap, entropy, saved, dlog_probs, dentropy,
  scratch_bytes)` writes the gradient of the logits into `out`, which may be `logits`.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..results import stats_dtype
from . import torch_backend


def row_backend(name: str) -> ModuleType:
    if name == "torch":
        return torch_backend
    from . import triton_backend

    return triton_backend


def new_stats(like: Tensor, num_rows: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for log_probs [T], entropy [T] and what the backend saves [T, NUM_SAVED]."""
    dtype = stats_dtype(like.dtype)
    log_probs = like.new_zeros(num_rows, dtype=dtype)
    saved = like.new_zeros((num_rows, row_backend(backend).NUM_SAVED), dtype=dtype)
    return log_probs, torch.zeros_like(log_probs), saved
