"""The logarithm of the sum of a row and the sum of its squared probabilities, both backends."""

from typing import Any

import pytest
import torch
from rft_kernels import (
    LseStats,
    linear_token_loss,
    linear_token_stats,
    linear_token_stats_with_lse,
    reference,
    sum_squared_probs,
    token_loss,
    token_stats,
    token_stats_with_lse,
)
from torch import Tensor

from tests.kernels.kernel_cases import (
    CASES,
    assert_as_exact,
    gradients,
    logits_case,
    loss_inputs,
    seeded,
)
from tests.kernels.test_token_stats import STRIDED

pytestmark = [  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TERMS = {"peaked": 4.0, "huge": 2.0, "flat": 2e-3}  # about 2 |d| p_j^2, which nearly cancel
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7, "vocab_size": 60},
    "rows": {"temperature": torch.linspace(0.5, 2, 13)},
    "softcap": {"softcap": 3.0, "temperature": 0.7},
}


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        request.getfixturevalue("small_tiles")
    return request.param


def targets(num_rows: int = 13) -> Tensor:
    found = torch.randint(40, 60, (num_rows,), generator=seeded(2))
    found[4 % num_rows] = -100
    return found


def outcome(op, logits: Tensor, *arguments: Tensor, **options: Any) -> list[Tensor]:
    """Results, and the gradient of a random sum of all by the logits."""
    logits = logits.detach().requires_grad_()
    found = op(logits, *arguments, **options)
    found = found if isinstance(found, tuple) else (found,)
    scalars = torch.randn(len(found), *found[0].shape, generator=seeded(3), dtype=torch.float64)
    total = sum((s.to(x.dtype) * x).sum() for s, x in zip(scalars, found, strict=True))
    return [*found, torch.autograd.grad(total, logits)[0]]


def compare(
    op, same, logits: Tensor, *arguments: Tensor, backend: str, terms: float = 0.0, **options: Any
) -> None:
    """Results as `assert_as_exact`; the gradient no worse than torch's worst of that row.

    For torch's own lse is rounded, and where that happens to cancel another rounding an entry of
    its gradient is exact. terms: how large are those whose difference the gradient is.
    """
    ours = outcome(op, logits, *arguments, backend=backend, **options)
    expected = outcome(same, logits, *arguments, **options)
    truth = outcome(same, logits.double(), *arguments, **options)
    for x, y, z in zip(ours[:-1], expected, truth, strict=False):
        assert_as_exact(x, y, z)
    error, allowed = ((x[-1].double() - truth[-1]).abs() for x in (ours, expected))
    terms = max(terms, truth[-1].abs().max().item())
    atol = 2 * torch.finfo(logits.dtype).eps * terms
    assert ours[-1].dtype == logits.dtype
    assert (error <= 2 * allowed.amax(-1, keepdim=True) + atol).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_lse_as_exact_as_torch(case, options, dtype, backend):
    logits = logits_case(case).to(dtype)
    compare(
        token_stats_with_lse, reference.token_stats_with_lse, logits, targets(),
        backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_sum_of_squares_as_exact_as_torch(case, options, dtype, backend):
    logits = logits_case(case).to(dtype)
    keep = torch.arange(13) != 4
    compare(
        sum_squared_probs, reference.sum_squared_probs, logits,
        backend=backend, row_mask=keep, terms=TERMS.get(case, 0.0), **options,
    )  # fmt: skip


def test_the_others_keep_their_bits(backend):
    """As nothing is added to a gradient that no lse has a part in."""
    for dtype in DTYPES.values():
        logits = logits_case("normal").to(dtype)
        expected = outcome(token_stats, logits, targets(), backend=backend)

        def first_two(*arguments, **options):
            return tuple(token_stats_with_lse(*arguments, **options)[:2])

        found = outcome(first_two, logits, targets(), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_one_result_used(which, backend):
    logits = logits_case("normal").requires_grad_()
    ours, same = (
        torch.autograd.grad(op(logits, targets(), **options)[which].sum(), logits)[0]
        for op, options in (
            (token_stats_with_lse, {"backend": backend}),
            (reference.token_stats_with_lse, {}),
        )
    )
    torch.testing.assert_close(ours, same, atol=1e-13, rtol=1e-11)


def test_a_row_of_the_gradient_sums_to_that_of_lse(backend):
    logits = logits_case("normal").requires_grad_()
    scalars = torch.randn(3, 13, generator=seeded(5), dtype=torch.float64)
    found = token_stats_with_lse(logits, targets(), backend=backend)
    (gradient,) = torch.autograd.grad((torch.stack(tuple(found)) * scalars).sum(), logits)
    expected = torch.where(targets() == -100, 0, scalars[2])
    torch.testing.assert_close(gradient.sum(-1), expected, atol=1e-12, rtol=0)
    squares = sum_squared_probs(logits, backend=backend)
    (gradient,) = torch.autograd.grad((squares * scalars[0]).sum(), logits)
    assert gradient.sum(-1).abs().max() < 1e-13 < gradient.abs().max()


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=str)
def test_gradcheck(options, backend):
    logits = logits_case("normal", 3, 6).requires_grad_()
    y = torch.tensor([0, -100, 4])
    options = options | {"vocab_size": 5, "backend": backend}
    assert torch.autograd.gradcheck(lambda x: tuple(token_stats_with_lse(x, y, **options)), logits)
    assert torch.autograd.gradcheck(lambda x: sum_squared_probs(x, **options), logits)


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strides_do_not_show(make, backend):
    logits = make(logits_case("normal").float())
    y = torch.randint(67, logits.shape[:-1], generator=seeded(0))
    whole = logits.clone(memory_format=torch.contiguous_format)
    for op, arguments in ((token_stats_with_lse, (y,)), (sum_squared_probs, ())):
        found = outcome(op, logits, *arguments, backend=backend)
        expected = outcome(op, whole, *arguments, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_rows_without_output_are_no_part_of_anything(backend):
    logits = logits_case("normal").float()
    keep = torch.arange(13) % 3 != 0
    logits[~keep] = torch.nan
    for op, arguments in ((token_stats_with_lse, (torch.arange(13),)), (sum_squared_probs, ())):
        found = outcome(op, logits, *arguments, row_mask=keep, backend=backend)
        assert all((x[~keep] == 0).all() and x[keep].isfinite().all() for x in found)
        alone = op(logits[keep], *(x[keep] for x in arguments), backend=backend)
        for x, y in zip(found, alone if isinstance(alone, tuple) else (alone,), strict=False):
            assert torch.equal(x[keep], y)
    assert sum_squared_probs(logits[:0], backend=backend).shape == (0,)


def test_inplace_backward(backend):
    leaf = logits_case("normal").float().requires_grad_()
    scalars = torch.linspace(-1, 1, 13)
    (expected,) = torch.autograd.grad((sum_squared_probs(leaf) * scalars).sum(), leaf)
    buffer = leaf * 1
    squares = sum_squared_probs(buffer, inplace_backward=True, backend=backend)
    (squares * scalars).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
    assert torch.equal(buffer.detach(), leaf.grad)


def test_results_may_be_changed_in_place():
    logits = logits_case("normal").requires_grad_()
    (expected,) = torch.autograd.grad(sum_squared_probs(logits).sum(), logits)
    squares = sum_squared_probs(logits)
    found = token_stats_with_lse(logits, targets())
    lse = found.lse.mul_(2)
    (gradient,) = torch.autograd.grad(squares.add_(0).sum() + lse.sum() * 0, logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (None, TypeError, "logits must be a tensor"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "logits must be a floating-point"),
        (torch.zeros(()), ValueError, "logits must be .* with V at least 1"),
        (torch.zeros(2, 0), ValueError, "logits must be .* with V at least 1"),
    ],
)
def test_refusals(logits, error, message):
    with pytest.raises(error, match=message):
        sum_squared_probs(logits)
    with pytest.raises(error, match=message):
        token_stats_with_lse(logits, torch.zeros(2, dtype=torch.int64))


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0, "temperature": 0.7},
    "rows": {"temperature": torch.linspace(0.5, 2, 24)},
    "padded": {"vocab_size": 30},
}


def head_inputs(options: dict[str, Any], **others: Any) -> dict[str, Any]:
    inputs = loss_inputs(**others)
    inputs = {name: inputs[name] for name in ("hidden", "lm_head_weight", "targets", "bias")}
    inputs["targets"] = inputs["targets"].clamp(max=29)
    return inputs | options


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_lse_from_hidden_states(options, backend):
    inputs = head_inputs(options)
    leading = (inputs.pop("hidden"), inputs.pop("lm_head_weight"), inputs.pop("targets"))
    wrt = (*leading[:2], inputs["bias"])
    scalars = torch.randn(3, 24, generator=seeded(5), dtype=torch.float64)

    def results(op, **others):
        found = op(*leading, **inputs, **others)
        total = (torch.stack(tuple(found)) * scalars).sum()
        return [*found, *torch.autograd.grad(total, wrt)]

    expected = results(reference.linear_token_stats_with_lse)
    for workspace in (2**30, 33 * 8 * 20):
        found = results(linear_token_stats_with_lse, workspace_bytes=workspace, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    found = linear_token_stats_with_lse(*leading, **inputs, backend=backend)
    assert isinstance(found, LseStats)
    others = linear_token_stats(*leading, **inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(found[:2], others, strict=True))


def with_z_loss(log_probs: Tensor, entropy: Tensor, lse: Tensor, weights: Tensor):
    z_loss = 1e-2 * lse.square()
    return weights * (z_loss - log_probs) - 0.1 * entropy, {"z_loss": z_loss}


def lse_alone(log_probs: Tensor, entropy: Tensor, lse: Tensor, weights: Tensor) -> Tensor:
    return weights * lse


@pytest.mark.parametrize("loss_fn", [with_z_loss, lse_alone])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_losses_of_lse(options, loss_fn, backend):
    inputs = head_inputs(options)
    tokens = (torch.rand(24, generator=seeded(6), dtype=torch.float64),)
    mask = torch.rand(24, generator=seeded(7)) > 0.2
    common = {"tokens": tokens, "mask": mask, "normalizer": 7, "with_lse": True}
    leading = [inputs[name] for name in ("hidden", "lm_head_weight", "targets")]
    rest = {name: inputs[name] for name in ("bias", *options)} | common
    expected = reference.linear_token_loss(*leading, loss_fn, **rest)
    truth = gradients(3 * expected.loss, inputs)
    for extra in ({}, {"workspace_bytes": 33 * 8 * 20}, {"active_rows": torch.arange(24)}):
        found = linear_token_loss(*leading, loss_fn, **rest, **extra, backend=backend, check=True)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-11, atol=1e-12)
        grads = gradients(3 * found.loss, inputs)
        torch.testing.assert_close(grads, truth, rtol=1e-11, atol=1e-12)
    hidden, weight, y = leading
    logits = torch.nn.functional.linear(hidden, weight, inputs["bias"])
    found = token_loss(logits, y, loss_fn, **options, **common, backend=backend, check=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(3 * found.loss, inputs), truth, rtol=1e-11, atol=1e-12)


def test_a_value_without_a_gradient_has_its_lse():
    """Rows outside `active_rows` count with their lse, not with that of another row."""
    inputs = head_inputs({})
    leading = [inputs[name] for name in ("hidden", "lm_head_weight", "targets")]
    options = {"tokens": (torch.ones(24).double(),), "normalizer": 1, "with_lse": True}
    every = linear_token_loss(*leading, lse_alone, **options)
    few = linear_token_loss(*leading, lse_alone, **options, active_rows=torch.arange(5))
    torch.testing.assert_close(few.loss, every.loss)
