"""No tokens at all: every public op and adapter gives results and gradients of no rows."""

from importlib.util import find_spec

import pytest
import torch
from rft_kernels import (
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_loss,
    linear_token_stats,
    policy_objective,
    prefix_rft_loss,
    select_top_entropy,
    token_loss,
    token_stats,
)
from rft_kernels.adapters import liger, trl, verl
from torch import Tensor

V = 5  # classes, and the width of hidden states
WEIGHT = torch.ones(7, V)
LAYOUTS = {
    "contiguous": lambda: torch.randn(0, V),
    "of no tokens": lambda: torch.randn(3, 0, V),
    "shifted": lambda: torch.randn(3, 4, V)[:, :-1][:0],
    "cut": lambda: torch.randn(3, 4, V)[:, :0],
    "transposed": lambda: torch.randn(3, 4, V)[:, :-1].transpose(0, 1)[:0],
    "of four dimensions": lambda: torch.randn(2, 3, 4, V)[:, :, :-1][:, :0],
    "expanded rows": lambda: torch.randn(1, V).expand(0, V),
    "expanded tokens": lambda: torch.randn(1, 1, V).expand(3, 0, V),
    "expanded sequences": lambda: torch.randn(1, 4, V)[:, :-1].expand(0, 3, V),
    "empty and expanded": lambda: torch.randn(0, 1, V).expand(0, 3, V),
    "columns first": lambda: torch.randn(V, 3).t()[:0],
}


def unlikely(log_probs: Tensor, entropy: Tensor) -> Tensor:
    return -log_probs - entropy


def per_token(x: Tensor) -> tuple[Tensor, ...]:
    """targets, old_log_probs, advantages, response_mask, prefix_mask."""
    ones = torch.ones(x.shape[:-1])
    return ones.long(), -ones, ones, ones.bool(), ones.bool()


OPS = {
    "token_stats": lambda x, **o: sum(token_stats(x, per_token(x)[0], **o)),
    "linear_token_stats": lambda x, **o: sum(linear_token_stats(x, WEIGHT, per_token(x)[0], **o)),
    "prefix_rft_loss": lambda x, **o: prefix_rft_loss(x, *per_token(x), normalizer=3, **o).loss,
    "two passes": lambda x, **o: (
        linear_prefix_rft_loss(x, WEIGHT, *per_token(x), normalizer=3, **o).loss
    ),
    "one pass": lambda x, **o: (
        linear_prefix_rft_loss(x, WEIGHT, *per_token(x)[:4], None, normalizer=3, **o).loss
    ),
    "token_loss": lambda x, **o: token_loss(x, per_token(x)[0], unlikely, normalizer=3, **o).loss,
    "linear_token_loss": lambda x, **o: (
        linear_token_loss(x, WEIGHT, per_token(x)[0], unlikely, normalizer=3, check=True, **o).loss
    ),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops(layout, op, backend):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    x = LAYOUTS[layout]().requires_grad_()
    found = OPS[op](x, backend=backend)
    assert not found.any()
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection_and_objective(layout):
    _, old, ones, mask, prefix = per_token(LAYOUTS[layout]())
    assert select_top_entropy(ones, mask).shape == mask.shape
    assert select_top_entropy(ones, mask, cu_seqlens=torch.tensor([0])).shape == mask.shape
    log_probs = ones.clone().requires_grad_()
    level = "sequence" if ones.dim() > 1 else "token"
    config = PolicyConfig(importance_level=level, entropy_coef=0.1)
    loss, _ = policy_objective(
        log_probs, old, ones, mask, normalizer=2, config=config, entropy=ones, prefix_mask=prefix
    )
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert loss == 0 and grad.shape == ones.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters(layout):
    x = LAYOUTS[layout]().requires_grad_()
    ids = per_token(x)[0]
    rows = x.reshape(-1, V)
    for found in (
        trl.selective_log_softmax(x, ids),
        trl.selective_log_softmax(x, ids[..., None].expand(*ids.shape, 2)),
        trl.entropy_from_logits(x),
        trl.ChunkedLogProbFunction.apply(rows, WEIGHT, None, ids.flatten(), 1.0, 3)[0],
        verl.logprobs_from_logits(x, ids, inplace_backward=False),
        verl.entropy_from_logits(x),
        verl.linear_cross_entropy(x, WEIGHT, ids)[0],
        verl.FusedLinearForPPO()(x, WEIGHT, ids)[0],
    ):
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert grad.shape == x.shape
    assert trl.get_high_entropy_mask(ids.float(), ids, 0.5).shape == ids.shape


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo", "vespo"])
@pytest.mark.parametrize("size", [(0, 3), (2, 0)], ids=["no sequences", "no tokens"])
def test_liger(size, loss_type):
    logits = torch.randn(size[0], size[1] + 1, V).requires_grad_()
    ids, advantages = torch.zeros(size, dtype=torch.int64), torch.ones(size[0])
    options = {"beta": 0.0, "loss_type": loss_type}
    loss, _, _ = liger.triton_grpo_loss(logits * 1, None, None, ids, advantages, **options)
    hidden = torch.randn(*size, V).requires_grad_()
    loss_function = liger.LigerFusedLinearGRPOLoss(**options)
    fused, _ = loss_function(hidden, WEIGHT, ids, torch.ones(size), advantages)
    loss.sum().backward()
    fused.backward()
    assert loss.shape == size and not logits.grad.any() and hidden.grad.shape == hidden.shape
