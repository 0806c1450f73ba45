"""What the tests of the Triton backend share: small tiles, and cases where the kernels run."""

import pytest
import torch
from rft_kernels.rows import launch
from torch import Tensor

from tests.kernels.kernel_cases import logits_case as logits_on_cpu
from tests.kernels.kernel_cases import seeded

pytest.importorskip("triton", reason="triton is not installed")
from rft_kernels.rows import triton_backend  # noqa: E402, F401

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = launch.RowLaunch(lanes=16, depth=2, num_warps=1, num_stages=2)
TILE = SMALL.lanes * SMALL.depth


def logits_case(name: str, num_rows: int = 13, vocab_size: int = 67) -> Tensor:
    if name == "tile of -inf":
        x = logits_on_cpu("normal", num_rows, vocab_size)
        x[:, TILE : 2 * TILE] = -torch.inf
    elif name == "only the last":
        x = torch.full((num_rows, vocab_size), -torch.inf, dtype=torch.float64)
        x[:, -1] = 3
    else:
        x = logits_on_cpu(name, num_rows, vocab_size)
    return x.to(DEVICE)


def scalars_for(targets: Tensor, seed: int = 3) -> Tensor:
    """[2, ...] the incoming gradients of log_probs and entropy."""
    return torch.randn(2, *targets.shape, generator=seeded(seed), dtype=torch.float64).to(DEVICE)


def arange(stop: int) -> Tensor:
    return torch.arange(stop, device=DEVICE)


def equal(xs, ys) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
