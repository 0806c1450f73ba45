"""token_stats of the torch backend against the specification, forward and gradient."""

import pytest
import torch
from rft_kernels import reference, token_stats
from rft_kernels.rows import torch_backend
from rft_kernels.rows.op import matrices

from tests.kernels.kernel_cases import CASES, assert_as_exact, logits_case, seeded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(op, logits, targets, scalars, **options):
    """log_probs, entropy and the gradient of <scalars, (log_probs, entropy)> by the logits."""
    logits = logits.detach().requires_grad_()
    found = op(logits, targets, **options)
    total = sum((s.to(x.dtype) * x).sum() for s, x in zip(scalars, found, strict=True))
    return *found, torch.autograd.grad(total, logits)[0]


def compare(logits, targets, **options):
    scalars = torch.randn(2, *targets.shape, generator=seeded(3), dtype=torch.float64)
    ours = run(token_stats, logits, targets, scalars, **options)
    same = run(reference.token_stats, logits, targets, scalars, **options)
    truth = run(reference.token_stats, logits.double(), targets, scalars, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == logits.dtype
    for x, y, z in zip(ours, same, truth, strict=True):
        assert_as_exact(x, y, z)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per row"])
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_torch(case: str, per_row: bool, dtype: torch.dtype):
    logits = logits_case(case).to(dtype)
    targets = torch.randint(40, 67, (13,), generator=seeded(2))
    targets[4] = -100
    temperature = torch.linspace(0.5, 2, 13) if per_row else 0.7
    compare(logits, targets, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", ["normal", "peaked", "huge", "one -inf"])
def test_softcap(case: str, dtype: torch.dtype):
    logits = logits_case(case).to(dtype)
    targets = torch.randint(40, 67, (13,), generator=seeded(2))
    compare(logits, targets, softcap=3.0, temperature=0.7)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 67), (3, 1001)])
def test_shapes(shape: tuple[int, int]):
    logits = logits_case("normal", *shape).float()
    compare(logits, torch.zeros(shape[0], dtype=torch.int32))


def test_entropy_has_no_sign():
    for logits in (
        torch.randn(3, 1),
        logits_case("normal").float() * 1e3,
        logits_case("peaked") * 9,
    ):
        entropy = token_stats(logits, torch.zeros(len(logits), dtype=torch.long)).entropy
        assert not entropy.signbit().any() and entropy.min() < 1e-6


def test_target_of_probability_zero():
    logits = logits_case("one -inf").float()
    targets = torch.zeros(13, dtype=torch.long)
    found = token_stats(logits, targets)
    assert (found.log_probs == -torch.inf).all() and found.entropy.isfinite().all()
    (gradient,) = torch.autograd.grad(
        token_stats(logits.requires_grad_(), targets).log_probs.sum(), logits
    )
    assert gradient.isfinite().all() and (gradient[:, 0] == 1).all()


def test_blocks_do_not_show(monkeypatch):
    logits, targets = logits_case("normal").float(), torch.arange(13)
    scalars = torch.randn(2, 13)
    scalars[:, 3:6] = 0
    whole = run(token_stats, logits, targets, scalars)
    monkeypatch.setitem(torch_backend._SCRATCH_BYTES, "cpu", 5 * 67 * 4 * 4)
    for x, y in zip(whole, run(token_stats, logits, targets, scalars), strict=True):
        assert torch.equal(x, y)


def test_padded_columns_are_no_part_of_anything():
    logits = logits_case("normal").float()
    padded = torch.cat([logits, torch.full((13, 5), torch.nan)], 1)
    targets, scalars = torch.arange(13), torch.ones(2, 13)
    plain = run(token_stats, logits, targets, scalars)
    cut = run(token_stats, padded, targets, scalars, vocab_size=67)
    assert torch.equal(cut[0], plain[0]) and torch.equal(cut[1], plain[1])
    assert torch.equal(cut[2][:, :67], plain[2]) and (cut[2][:, 67:] == 0).all()


def test_rows_without_output_are_no_part_of_anything():
    logits, targets = logits_case("normal").float(), torch.arange(13)
    row_mask = torch.arange(13) % 3 != 0
    targets[4] = -100
    targets[0] = 10**6  # masked, so never looked at
    logits[::3] = torch.nan
    logits[4] = torch.nan
    scalars = torch.full((2, 13), torch.nan)
    valid = row_mask & (targets != -100)
    scalars[:, valid] = 1
    log_probs, entropy, gradient = run(token_stats, logits, targets, scalars, row_mask=row_mask)
    for x in (log_probs, entropy, gradient):
        assert x[valid].isfinite().all() and (x[~valid] == 0).all()
    alone = run(token_stats, logits[valid], targets[valid], scalars[:, valid])
    assert torch.equal(log_probs[valid], alone[0]) and torch.equal(gradient[valid], alone[2])


def test_no_rows_and_only_masked_rows():
    empty = run(token_stats, torch.randn(0, 7), torch.zeros(0, dtype=torch.long), torch.ones(2, 0))
    assert [x.shape for x in empty] == [(0,), (0,), (0, 7)]
    masked = run(token_stats, torch.randn(3, 7), torch.full((3,), -100), torch.ones(2, 3))
    assert all((x == 0).all() for x in masked)


STRIDED = {
    "strided rows": lambda x: x.repeat(1, 2)[:, : x.shape[1]],
    "strided columns": lambda x: x.t().contiguous().t(),
    "shifted [B, L, V]": lambda x: torch.stack([x, x], 0)[:, :-1],
    "transposed [L, B, V]": lambda x: torch.stack([x, x], 0).transpose(0, 1),
    "no leading dimension": lambda x: x[0],
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strides_do_not_show_and_are_not_copied(make):
    logits = make(logits_case("normal").float())
    targets = torch.randint(67, logits.shape[:-1], generator=seeded(0))
    scalars = torch.randn(2, *targets.shape, generator=seeded(1))
    for x, y in zip(
        run(token_stats, logits, targets, scalars),
        run(token_stats, logits.clone(memory_format=torch.contiguous_format), targets, scalars),
        strict=True,
    ):
        assert torch.equal(x, y)
    storage = logits.untyped_storage().data_ptr()
    assert all(m.untyped_storage().data_ptr() == storage for m in matrices(logits))


def test_inplace_backward_overwrites_the_logits():
    targets, scalars = torch.arange(13), torch.randn(2, 13)
    scalars[:, 2] = 0
    logits = logits_case("normal").float()
    *_, expected = run(token_stats, logits, targets, scalars, vocab_size=60)
    leaf = logits.clone().requires_grad_()
    buffer = leaf * 1
    found = token_stats(buffer, targets, vocab_size=60, inplace_backward=True)
    total = (scalars[0] * found.log_probs + scalars[1] * found.entropy).sum()
    total.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected) and torch.equal(buffer.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_gradients_in_float64():
    logits = logits_case("normal", 4, 6).requires_grad_()
    targets, row_mask = torch.tensor([0, -100, 4, 2]), torch.tensor([True, True, True, False])
    for temperature in (0.7, torch.tensor([0.5, 1.0, 2.0, 3.0])):
        assert torch.autograd.gradcheck(
            lambda x, t=temperature: tuple(
                token_stats(x, targets, temperature=t, row_mask=row_mask, vocab_size=5)
            ),
            [logits],
        )


def test_only_one_output_used():
    logits, targets = logits_case("normal").requires_grad_(), torch.arange(13)
    for which in (0, 1):
        ours = torch.autograd.grad(token_stats(logits, targets)[which].sum(), logits)[0]
        same = torch.autograd.grad(reference.token_stats(logits, targets)[which].sum(), logits)[0]
        torch.testing.assert_close(ours, same, atol=1e-15, rtol=1e-12)
