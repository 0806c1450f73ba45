"""Which implementation of the two vocabulary-sized primitives serves a call.

A backend is a module with two functions and a constant, and that is all it is asked for:

- `row_stats(logits, targets, valid, temperature, softcap, scratch_bytes)`
  -> `(log_probs, entropy, saved)`, `saved` [T, NUM_SAVED] being what its `row_grad` wants back;
- `row_grad(out, logits, targets, temperature, softcap, entropy, saved, dlog_probs, dentropy,
  scratch_bytes)` writes the gradient of the logits into `out`, which may be `logits`.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import _check, torch_backend

NAMES = ("auto", "torch", "triton")


def resolve(name: str) -> str:
    """The backend's own name; raises ValueError for an unknown one, and for one not built yet."""
    _check.one_of("backend", name, NAMES)
    if name == "triton":
        raise NotImplementedError("backend 'triton' is not available yet; use 'torch' or 'auto'")
    return "torch"


def module(name: str) -> ModuleType:
    return {"torch": torch_backend}[name]


def new_stats(like: Tensor, num_rows: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for log_probs [T], entropy [T] and what the backend saves [T, NUM_SAVED]."""
    dtype = torch_backend.stats_dtype(like.dtype)
    log_probs = like.new_zeros(num_rows, dtype=dtype)
    saved = like.new_zeros((num_rows, module(backend).NUM_SAVED), dtype=dtype)
    return log_probs, torch.zeros_like(log_probs), saved
