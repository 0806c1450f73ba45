"""Which implementation of the two vocabulary-sized primitives serves a call.

A backend is a module with two functions and a constant, and that is all it is asked for:

- `row_stats(logits, targets, valid, temperature, softcap, scratch_bytes)`
  -> `(log_probs, entropy, saved)`, `saved` [T, NUM_SAVED] being what its `row_grad` wants back;
- `row_grad(out, logits, targets, temperature, softcap, entropy, saved, dlog_probs, dentropy,
  scratch_bytes)` writes the gradient of the logits into `out`, which may be `logits`.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import _check, torch_backend

NAMES = ("auto", "torch", "triton")
_HAS_TRITON = find_spec("triton") is not None


def resolve(name: str, device: torch.device) -> str:
    """The backend's own name for tensors on `device`.

    "auto" is triton on CUDA where it is installed, else torch. Raises ValueError for an unknown
    name, and for "triton" where it cannot run.
    """
    _check.one_of("backend", name, NAMES)
    on_cuda = device.type == "cuda"
    if name == "auto":
        return "triton" if on_cuda and _HAS_TRITON else "torch"
    if name == "triton" and not _HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if name == "triton" and not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment, "
            f"got tensors on {device}"
        )
    return name


def module(name: str) -> ModuleType:
    if name == "torch":
        return torch_backend
    from . import triton_backend

    return triton_backend


def new_stats(like: Tensor, num_rows: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for log_probs [T], entropy [T] and what the backend saves [T, NUM_SAVED]."""
    dtype = torch_backend.stats_dtype(like.dtype)
    log_probs = like.new_zeros(num_rows, dtype=dtype)
    saved = like.new_zeros((num_rows, module(backend).NUM_SAVED), dtype=dtype)
    return log_probs, torch.zeros_like(log_probs), saved
