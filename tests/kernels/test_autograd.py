"""What a caller may do between forward and backward, and that a second derivative is refused."""

from importlib.util import find_spec

import pytest
import torch
from rft_kernels import (
    linear_prefix_rft_loss,
    linear_token_loss,
    linear_token_stats,
    policy_objective,
    prefix_rft_loss,
    token_loss,
    token_stats,
)

from tests.kernels.kernel_cases import from_logits, loss_inputs, seeded

SHAPES = [(24,), (4, 6)]
STATS = {
    "token_stats": lambda x, w, y, **o: token_stats(x @ w.T, y, **o),
    "linear_token_stats": linear_token_stats,
}


def unlikely(log_probs, entropy):
    return -log_probs * entropy.detach() - entropy


def as_function(op, inputs):
    keep = ("hidden", "lm_head_weight", "targets", "bias", "normalizer")
    kept = {name: inputs[name] for name in keep} | {"loss_fn": unlikely}
    return linear_token_loss(**kept) if op == "linear" else from_logits(token_loss, kept)


LOSSES = {
    "prefix_rft_loss": lambda inputs: from_logits(prefix_rft_loss, inputs),
    "two passes": lambda inputs: linear_prefix_rft_loss(**inputs),
    "one pass": lambda inputs: linear_prefix_rft_loss(**inputs | {"prefix_mask": None}),
    "token_loss": lambda inputs: as_function("logits", inputs),
    "linear_token_loss": lambda inputs: as_function("linear", inputs),
}


@pytest.mark.parametrize("op", STATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_may_be_changed_in_place(op, shape):
    inputs = loss_inputs()
    hidden, weight = inputs["hidden"], inputs["lm_head_weight"]
    arguments = (hidden.view(*shape, -1), weight, inputs["targets"].view(shape))
    log_probs, entropy = STATS[op](*arguments)
    expected = torch.autograd.grad((2 * entropy + log_probs).sum(), hidden)
    log_probs, entropy = STATS[op](*arguments)
    entropy *= 2
    log_probs += 1
    found = torch.autograd.grad((entropy + log_probs).sum(), hidden)
    assert torch.equal(*found, *expected)


@pytest.mark.parametrize("op", LOSSES)
def test_what_a_loss_reports_may_be_changed_in_place(op):
    inputs = loss_inputs()
    expected = torch.autograd.grad(LOSSES[op](inputs).loss, inputs["hidden"])
    out = LOSSES[op](inputs)
    for reported in (out.log_probs, out.entropy, *out.metrics.values()):
        reported.zero_()
    assert torch.equal(*torch.autograd.grad(out.loss, inputs["hidden"]), *expected)


@pytest.mark.parametrize("op", [*STATS, *LOSSES, "policy_objective"])
def test_a_second_derivative_is_refused(op):
    inputs = loss_inputs()
    x = inputs["hidden"]
    if op in STATS:
        total = sum(x.sum() for x in STATS[op](x, inputs["lm_head_weight"], inputs["targets"]))
    elif op in LOSSES:
        total = LOSSES[op](inputs).loss
    else:
        x = inputs["old_log_probs"].clone().requires_grad_()
        arguments = (inputs[name] for name in ("old_log_probs", "advantages", "response_mask"))
        total, _ = policy_objective(x, *arguments, normalizer=3)
    with pytest.raises(RuntimeError, match="differentiable once|no autograd formula"):
        # As part of more, so that the gradient has a graph whatever the op says.
        (grad,) = torch.autograd.grad(total * x.sum(), x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("op", [token_stats, linear_token_stats])
def test_a_temperature_in_rows_without_an_output_has_no_effect(op, value, backend):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    hidden = torch.randn(5, 3, generator=seeded(0)).requires_grad_()
    weight = (torch.randn(3, 3, generator=seeded(1)),) if op is linear_token_stats else ()
    targets = torch.tensor([0, 1, 2, 0, -100])
    row_mask = torch.tensor([True, True, False, True, True])
    temperature = torch.tensor([0.5, 1, 2, 3, 4])

    def run():
        options = {"temperature": temperature, "row_mask": row_mask, "backend": backend}
        found = op(hidden, *weight, targets, **options)
        return *found, *torch.autograd.grad(sum(x.sum() for x in found), hidden)

    expected = run()
    temperature[[2, 4]] = value
    assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))
    temperature[1] = value
    with pytest.raises(ValueError, match="temperature must be greater than 0 and finite"):
        run()
