"""Inputs and the tolerance rule shared by the tests of rft_kernels."""

from typing import Any

import torch
from rft_kernels import reference
from torch import Tensor

CASES = ("normal", "peaked", "flat", "huge", "ties", "one -inf", "block of -inf", "row near -150")


def logits_case(name: str, num_rows: int = 13, vocab_size: int = 67) -> Tensor:
    """[T, V] float64 logits."""
    x = torch.randn(num_rows, vocab_size, generator=seeded(1), dtype=torch.float64)
    if name == "peaked":
        x[:, 5] += 30
    elif name == "flat":
        x.zero_()
    elif name == "huge":
        x = torch.where(x > 0, 1e4, -1e4) + x
    elif name == "ties":
        x = x.round()
    elif name == "one -inf":
        x[:, 0] = -torch.inf
    elif name == "block of -inf":
        x[:, : vocab_size // 2] = -torch.inf
    elif name == "row near -150":
        x[::2] -= 150
    return x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_as_exact(ours: Tensor, same: Tensor, truth: Tensor) -> None:
    """Elementwise |ours - truth| <= 2 |same - truth| + atol: no worse than torch in that dtype.

    `same` is the reference in the dtype of `ours`, `truth` in float64; atol is two units in the
    last place of the largest entry.
    """
    assert ours.dtype == same.dtype and ours.shape == truth.shape
    finite = truth.isfinite()
    assert torch.equal(ours[~finite].double(), truth[~finite])
    if finite.any():
        atol = 2 * torch.finfo(ours.dtype).eps * truth[finite].abs().max()
        error, allowed = (ours.double() - truth).abs(), 2 * (same.double() - truth).abs() + atol
        worst = (error - allowed)[finite].max()
        assert worst <= 0, f"{worst:.3g} past the tolerance (atol {atol:.3g})"


def loss_inputs(
    num_rows: int = 24,
    width: int = 8,
    vocab_size: int = 33,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `linear_prefix_rft_loss`, all branches of the loss hit by some token.

    `hidden`, `lm_head_weight` and `bias` require gradients; ratios are exp(about N(0, 0.3)).
    """
    rand = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rand, dtype=torch.float64)

    hidden = normal(num_rows, width).to(dtype).requires_grad_()
    weight = (0.7 * normal(vocab_size, width)).to(dtype).requires_grad_()
    bias = normal(vocab_size).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (num_rows,), generator=rand)
    with torch.no_grad():
        found = reference.linear_token_stats(hidden, weight, targets, bias=bias)
    advantages = normal(num_rows).sign()
    if num_rows > 5:
        advantages[2:4] = 0
        targets[5] = -100
    return {
        "hidden": hidden,
        "lm_head_weight": weight,
        "targets": targets,
        "old_log_probs": found.log_probs + 0.3 * normal(num_rows),
        "advantages": advantages,
        "response_mask": torch.rand(num_rows, generator=rand) > 0.2,
        "prefix_mask": torch.rand(num_rows, generator=rand) > 0.5,
        "bias": bias,
        "normalizer": 3 * num_rows + 1,
    }


def gradients(loss: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """Gradients by hidden states, weight and bias; the graph is kept."""
    wrt = [inputs[name] for name in ("hidden", "lm_head_weight", "bias")]
    return list(torch.autograd.grad(loss, wrt, retain_graph=True))


def from_logits(op: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Calls an op that takes logits, with the logits of the inputs of a linear op."""
    rest = dict(inputs)
    hidden, weight, bias = (rest.pop(name) for name in ("hidden", "lm_head_weight", "bias"))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return op(logits, **rest, **options)
