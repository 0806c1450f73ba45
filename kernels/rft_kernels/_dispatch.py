"""Which backend serves a call: decided here, for every op."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from . import _check

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


def resolve_for_tokens(name: str, like: Tensor) -> str:
    """As `resolve`, for the O(T) ops, whose Triton kernels know 32 bits at most."""
    name = resolve(name, like.device)
    return "torch" if like.dtype == torch.float64 else name
