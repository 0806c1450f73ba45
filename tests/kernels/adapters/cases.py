"""What the tests of the adapters share: small inputs, and outcomes that are compared."""

import inspect
from pathlib import Path

import torch
from rft_kernels import token_stats

ROOT = Path(__file__).resolve().parents[3]


B, L, V, D = 3, 7, 41, 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, L, V] that require a gradient, and classes [B, L]."""
    logits = (3 * torch.randn(B, L, V, generator=seeded(0))).to(dtype).requires_grad_()
    return logits, torch.randint(V, (B, L), generator=seeded(1))


def compare(ours, theirs, *arguments, rtol=1e-4, atol=2e-6, wrt, **options):
    """Both functions on the same inputs: every output, and the gradient of a random sum of all."""

    def outcome(function):
        found = function(*arguments, **options)
        found = found if isinstance(found, tuple) else (found,)
        floats = [x for x in found if x.requires_grad]
        weights = [torch.randn(x.shape, generator=seeded(9)) for x in floats]
        total = sum((x * w).sum() for x, w in zip(floats, weights, strict=True))
        return [*found, *torch.autograd.grad(total, wrt)]

    for x, y in zip(outcome(ours), outcome(theirs), strict=True):
        assert x.requires_grad == y.requires_grad
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


def counting(monkeypatch, module) -> list:
    """Arguments of every call of `token_stats` from an adapter."""
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return token_stats(*arguments, **options)

    monkeypatch.setattr(module, "token_stats", counted)
    return calls


def random(*shape: int, seed: int, scale: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=seeded(seed))).to(dtype)


def head(num_rows: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states [num_rows, D], weight, bias and classes; logits of a spread of about 2."""
    hidden = random(num_rows, D, seed=0, dtype=dtype).requires_grad_()
    weight = random(V, D, seed=1, scale=0.4, dtype=dtype).requires_grad_()
    bias = random(V, seed=2, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(V, (num_rows,), generator=seeded(3))


def outcome(function, *arguments, **options) -> list:
    """Outputs, and gradients by every argument that takes one, of a random sum of the outputs."""
    found = function(*arguments, **options)
    floats = [x for x in found if x is not None and x.requires_grad]
    weights = [random(*x.shape, seed=9 + i) for i, x in enumerate(floats)]
    total = sum((x * w).sum() for x, w in zip(floats, weights, strict=True))
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*found, *torch.autograd.grad(total, leaves)]


def assert_same(ours: list, theirs: list, *, rtol: float = 1e-4, atol: float = 5e-6) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.requires_grad == y.requires_grad
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def parameters_of(function) -> list[tuple]:
    names = inspect.signature(function).parameters.values()
    return [(x.name, x.default) for x in names if x.name not in ("self", "cls", "ctx")]
