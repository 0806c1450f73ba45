"""What only the ops from hidden states have: buffers, low-rank terms, 16-bit products, rows."""

from functools import partial

import pytest
import torch
from rft_kernels import (
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_stats,
    reference,
)
from rft_kernels.linear import gemm, ops, passes, tiles
from rft_kernels.objective import FunctionLoss, Tokens
from rft_kernels.rows import Slopes

from tests.kernels.kernel_cases import assert_as_exact, gradients, loss_inputs, seeded
from tests.kernels.test_behaviour import SLACK_BYTES, compiled, peak_bytes

CONFIG = PolicyConfig(entropy_coef=0.05, dual_clip=1.2)
PASSES = pytest.mark.parametrize("selecting", [False, True], ids=["one pass", "two passes"])
NAMES = ("hidden", "lm_head_weight", "bias")


def inputs_of(selecting: bool, *shape: int, **options) -> dict:
    inputs = loss_inputs(*shape, **options) | {"config": CONFIG}
    if not selecting:
        num_rows = len(inputs["hidden"])
        inputs["selected_mask"] = torch.rand(num_rows, generator=seeded(8)) > 0.5
    return inputs


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that was never written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@PASSES
@pytest.mark.parametrize("advantages", [0.0, 1.0], ids=["nothing active", "active"])
def test_nothing_unwritten_is_read(poisoned, advantages, selecting):
    assert torch.empty(3).isnan().all()
    inputs = inputs_of(selecting) | {"vocab_size": 30, "workspace_bytes": 33 * 8 * 20}
    inputs["config"] = PolicyConfig()
    inputs["targets"] = inputs["targets"].clamp(max=29)
    inputs["advantages"] = inputs["advantages"] * advantages
    expected = reference.linear_prefix_rft_loss(
        **{k: x for k, x in inputs.items() if k != "workspace_bytes"}
    )
    found = linear_prefix_rft_loss(**inputs)
    truth = gradients(expected.loss, inputs)
    torch.testing.assert_close(gradients(found.loss, inputs), truth, atol=1e-14, rtol=1e-10)


@PASSES
def test_weight_gradients_are_added_to_a_buffer(selecting):
    inputs = inputs_of(selecting) | {"workspace_bytes": 33 * 8 * 20}
    weight = inputs["lm_head_weight"]
    loss = linear_prefix_rft_loss(**inputs).loss
    dhidden, dweight, dbias = gradients(loss, inputs)
    start = torch.randn(weight.shape, generator=seeded(2), dtype=weight.dtype)
    buffer = start.clone()
    first = linear_prefix_rft_loss(**inputs, accumulate_dweight=buffer).loss
    second = linear_prefix_rft_loss(**inputs, accumulate_dweight=buffer).loss
    assert torch.equal(first, loss) and torch.equal(buffer, start)
    (3 * first).backward(retain_graph=True)
    torch.testing.assert_close(buffer, start + 3 * dweight, rtol=1e-12, atol=1e-14)
    assert weight.grad is None
    torch.testing.assert_close(inputs["hidden"].grad, 3 * dhidden, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(inputs["bias"].grad, 3 * dbias, rtol=1e-12, atol=1e-14)
    first.backward()
    second.backward()
    torch.testing.assert_close(buffer, start + 5 * dweight, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        linear_prefix_rft_loss(**inputs, accumulate_dweight=buffer)
    torch.testing.assert_close(buffer, start + 5 * dweight, rtol=1e-12, atol=1e-14)


@PASSES
def test_a_buffer_is_filled_under_compile_too(selecting):
    inputs = inputs_of(selecting)
    wrt = [inputs[name] for name in NAMES]
    buffer = torch.zeros_like(inputs["lm_head_weight"].detach())
    _, dweight, _ = gradients(linear_prefix_rft_loss(**inputs).loss, inputs)

    def loss(*wrt):
        named = inputs | dict(zip((*NAMES, "accumulate_dweight"), wrt, strict=True))
        return linear_prefix_rft_loss(**named).loss

    compiled(loss)(*wrt, buffer).backward()
    assert torch.equal(buffer, dweight) and inputs["lm_head_weight"].grad is None


@PASSES
def test_a_buffer_is_not_rounded_to_the_weights_dtype(selecting):
    inputs = inputs_of(selecting, dtype=torch.bfloat16)
    doubles = inputs | {name: inputs[name].detach().double().requires_grad_() for name in NAMES}
    doubles["selected_mask"] = linear_prefix_rft_loss(**inputs).selected_mask
    _, truth, _ = gradients(reference.linear_prefix_rft_loss(**doubles).loss, doubles)
    buffer = torch.zeros(truth.shape)
    linear_prefix_rft_loss(**inputs, accumulate_dweight=buffer).loss.backward()
    error = (buffer.double() - truth).abs().max() / truth.abs().max()
    assert error < 1e-6 < (truth.bfloat16().double() - truth).abs().max() / truth.abs().max()


def test_two_passes_into_a_buffer_need_no_other():
    inputs = loss_inputs(8, 64, 4000, dtype=torch.float32) | {"workspace_bytes": 2**17}
    weight = inputs["lm_head_weight"]
    buffer = torch.zeros_like(weight.detach())
    peak = peak_bytes(
        lambda: linear_prefix_rft_loss(**inputs, accumulate_dweight=buffer).loss.backward()
    )
    assert peak < 2**17 + 4000 * 4 + SLACK_BYTES < weight.nbytes
    assert buffer.abs().max() > 0


def test_buffers_that_are_refused():
    inputs = loss_inputs()
    weight = inputs["lm_head_weight"]
    for wrong, message in (
        (torch.zeros(33, 8), "must be torch.float64"),
        (torch.zeros(33, 7).double(), "must have shape"),
        (torch.zeros_like(weight).requires_grad_(), "must be a buffer without a gradient"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"accumulate_dweight {message}"):
            linear_prefix_rft_loss(**inputs, accumulate_dweight=wrong)
    inputs["lm_head_weight"] = weight.detach()
    with pytest.raises(ValueError, match="lm_head_weight that requires one"):
        linear_prefix_rft_loss(**inputs, accumulate_dweight=torch.zeros_like(weight))


def low_rank_term(inputs: dict, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rand, like = seeded(4), inputs["hidden"].dtype
    shapes = ((len(inputs["hidden"]), rank), (len(inputs["lm_head_weight"]), rank))
    both = (torch.randn(shape, generator=rand, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(like).requires_grad_() for x in both)


@PASSES
@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
def test_a_low_rank_term_is_one_more_product(frozen, selecting):
    inputs = inputs_of(selecting) | {"softcap": 2.0, "workspace_bytes": 33 * 8 * 20}
    inputs["low_rank"] = inner, up = low_rank_term(inputs)
    inputs["lm_head_weight"].requires_grad_(not frozen)
    found = linear_prefix_rft_loss(**inputs)
    wrt = [inputs["hidden"], inner, up, inputs["bias"]]
    wrt += [] if frozen else [inputs["lm_head_weight"]]
    ours = torch.autograd.grad(found.loss, wrt)
    plain = {k: x for k, x in inputs.items() if k not in ("low_rank", "workspace_bytes")}
    plain["hidden"] = torch.cat([inputs["hidden"], inner], -1)
    plain["lm_head_weight"] = torch.cat([inputs["lm_head_weight"], up], -1)
    expected = reference.linear_prefix_rft_loss(**plain)
    torch.testing.assert_close(found.loss, expected.loss)
    truth = torch.autograd.grad(expected.loss, wrt)
    torch.testing.assert_close(ours, truth, atol=1e-14, rtol=1e-10)


@PASSES
def test_a_frozen_weight_with_a_low_rank_term_costs_nothing_of_its_size(selecting):
    inputs = inputs_of(selecting, 8, 64, 4000, dtype=torch.float32) | {"workspace_bytes": 2**17}
    inputs["low_rank"] = low_rank_term(inputs, rank=2)
    weight = inputs["lm_head_weight"].requires_grad_(False)
    peak = peak_bytes(lambda: linear_prefix_rft_loss(**inputs).loss.backward())
    assert peak < 2**17 + 4000 * 4 * (3 * 2 + 2) + SLACK_BYTES < weight.nbytes


def test_low_rank_terms_that_are_refused():
    inputs = loss_inputs()
    inner, up = low_rank_term(inputs)
    for wrong, message in (
        (up, r"low_rank must be a pair"),
        ((inner, up[:5]), r"low_rank\[1\] must be \[33, R\]"),
        ((inner[:, :2], up), r"low_rank\[0\] must have shape \[24, 3\]"),
        ((inner.float(), up), r"low_rank\[0\] must be torch.float64"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            linear_token_stats(
                inputs["hidden"], inputs["lm_head_weight"], inputs["targets"], low_rank=wrong
            )


@pytest.fixture
def mixed_gemms(monkeypatch):
    """The products of a CUDA device on a CPU: operands of 16 bits, sums and result in float32."""
    seen = []

    def widened(a, b, out_dtype, out):
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out_dtype == out.dtype
        assert out_dtype == torch.float32
        seen.append(a.dtype)
        return a.float() @ b.float()

    real_mm = torch.mm

    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return real_mm(a, b, out=out)
        return out.copy_(widened(a, b, out_dtype, out))

    def addmm(total, a, b, *, out_dtype, out):
        return out.copy_(total + widened(a, b, out_dtype, out))

    monkeypatch.setattr(gemm, "MIXED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return seen


@PASSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_of_16_bits_are_as_exact_as_torch(mixed_gemms, dtype, selecting):
    inputs = inputs_of(selecting, 40, 16, 300, dtype=dtype)
    inputs["low_rank"] = low_rank_term(inputs)
    found = linear_prefix_rft_loss(**inputs, workspace_bytes=300 * 6 * 24)
    inputs["selected_mask"] = found.selected_mask
    inner, up = inputs.pop("low_rank")

    def loss_and_gradients(dtype):
        wrt = [inputs["hidden"], inner, inputs["lm_head_weight"], up, inputs["bias"]]
        h, i, w, u, b = wrt = [x.detach().to(dtype).requires_grad_() for x in wrt]
        named = inputs | {"hidden": torch.cat([h, i], -1), "bias": b}
        named["lm_head_weight"] = torch.cat([w, u], -1)
        result = reference.linear_prefix_rft_loss(**named)
        return [result.loss.detach(), *torch.autograd.grad(result.loss, wrt)]

    wrt = [inputs["hidden"], inner, inputs["lm_head_weight"], up, inputs["bias"]]
    ours = [found.loss.detach(), *torch.autograd.grad(found.loss, wrt)]
    for x, y, z in zip(
        ours, loss_and_gradients(dtype), loss_and_gradients(torch.float64), strict=True
    ):
        assert_as_exact(x, y, z)
    # float16 only where nothing is rounded to it: in the projections.
    num_tiles = 2
    products = 6 if dtype == torch.bfloat16 else 2
    assert len(mixed_gemms) >= products * num_tiles and set(mixed_gemms) == {dtype}


@PASSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_of_a_device_begin_where_it_reads_vectors(
    mixed_gemms, monkeypatch, backend, dtype, selecting
):
    """Tiles and their gradients are as far apart as CUDA wants, and nothing else is different."""
    inputs = inputs_of(selecting, 40, 16, 301, dtype=dtype) | {"backend": backend}
    options = {"workspace_bytes": 320 * 6 * 24, "vocab_size": 299}
    inputs["targets"] = inputs["targets"].clamp(max=298)
    expected = linear_prefix_rft_loss(**inputs, **options)
    truth = gradients(expected.loss, inputs)
    strides, product = [], {name: getattr(gemm, name) for name in ("mm", "addmm")}

    def seen(name, a, b, out):
        strides.extend(x.stride(0) for x in (a, out) if x.shape[1] == 299)
        product[name](a, b, out)

    for name in product:
        monkeypatch.setattr(gemm, name, partial(seen, name))
    monkeypatch.setitem(tiles._ROW_MULTIPLES, "cpu", tiles._ROW_MULTIPLES["cuda"])
    found = linear_prefix_rft_loss(**inputs, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    for x, y in zip(gradients(found.loss, inputs), truth, strict=True):
        torch.testing.assert_close(x, y)
    assert len(strides) >= 3 and set(strides) == {320}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_active", [None, 30])
def test_passes_on_a_device_read_no_value(monkeypatch, dtype, num_active):
    """On meta tensors, which have none, as on CUDA: products of 16 bits, nothing counted."""

    def addmm(total, a, b, *, out_dtype, out):
        """Not every torch has it on meta tensors; a total that is not `out` would be copied."""
        assert total is out and out.shape == (len(a), b.shape[1]) and a.shape[1] == len(b)
        assert a.dtype == b.dtype and out_dtype == out.dtype

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "MIXED_DEVICES", ("cuda", "meta"))
    empty = partial(torch.empty, device="meta")
    hidden, weight = empty(50, 16 + 4, dtype=dtype), empty(320, 16, dtype=dtype)
    up, bias = empty(320, 4, dtype=dtype), empty(320, dtype=dtype)
    targets, floats, mask = empty(50, dtype=torch.int64), empty(50), empty(50, dtype=torch.bool)
    active = None if num_active is None else empty(num_active, dtype=torch.int64)
    projection = tiles.Projection(
        hidden, weight, up, bias, targets, floats, 1.0, 3.0, 299, 320 * 6 * 24, "torch"
    )
    head = tiles.make_head(projection)
    rows = tiles.Rows(mask, mask, active, only_active=True)
    found = passes.stats_pass(head, rows)
    assert {x.shape for x in found[:3]} == {floats.shape}
    shapes = [(50, 20), (320, 16), (320, 4), (320,)]
    given = (passes.Saved(found.entropy, found.saved), Slopes(floats, floats, floats))
    for into, wanted in ((None, shapes), (empty(320, 16), [shapes[0], (0,), *shapes[2:]])):
        found = passes.grad_pass(head, active, *given, [True] * 4, into)
        assert [x.shape for x in found] == wanted
    tokens = Tokens(floats, mask, floats, mask, floats, floats)
    rows = rows._replace(only_active=False)
    found = ops.policy_of(head, rows, tokens, CONFIG.terms, [True] * 4)
    function = FunctionLoss(lambda log_probs, entropy, x: x * log_probs, (floats,), check=False)
    others = ops.function_of(head, rows, function, [True] * 4)
    assert [x.shape for x in others] == [(50,), *(x.shape for x in found)]
    assert [x.shape for x in found] == [(50,), (50,), *shapes]
    assert {x.dtype for x in found} == {torch.float32}


def test_operands_by_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    f16, b16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert gemm.operand_dtypes(b16, f32, cpu) == (f32, f32)
    assert gemm.operand_dtypes(b16, f32, cuda) == (b16, b16)
    assert gemm.operand_dtypes(f16, f32, cuda) == (f16, f32)
    assert gemm.operand_dtypes(f32, f32, cuda) == (f32, f32)
    assert gemm.operand_dtypes(f64, f64, cuda) == (f64, f64)
    for name in ("mm", "addmm"):  # what CUDA is asked for exists
        assert "dtype_out" in getattr(torch.ops.aten, name).overloads()


@PASSES
@pytest.mark.parametrize("stats", ["all", "active"])
def test_a_device_is_told_the_number_of_active_rows(monkeypatch, stats, selecting):
    """As on a device: nothing is counted, and rows without advantage are not even projected."""
    inputs = inputs_of(selecting, dtype=torch.float32) | {"stats": stats}
    inputs["advantages"][7:] = 0
    inputs["config"] = PolicyConfig()
    expected = linear_prefix_rft_loss(**inputs)
    truth = gradients(expected.loss, inputs)
    projected, product = [], gemm.mm

    def mm(a, b, out):
        projected.append(len(a) if out.shape[1] == 33 else 0)
        product(a, b, out)

    monkeypatch.setattr(gemm, "mm", mm)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    monkeypatch.setattr(tiles, "_COUNTING_DEVICES", ())
    inputs["active_rows"] = torch.arange(7)
    with torch.no_grad():
        linear_prefix_rft_loss(**inputs, backend="triton")
    without_gradient = sum(projected)
    assert without_gradient == (7 if stats == "active" and not selecting else 24)
    projected.clear()
    found = linear_prefix_rft_loss(**inputs, backend="triton")
    in_forward = sum(projected)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    for name, x in zip(NAMES, truth, strict=True):
        torch.testing.assert_close(inputs[name].grad, x, rtol=1e-5, atol=1e-7)
    assert in_forward == without_gradient
    assert sum(projected) - in_forward == (7 if selecting else 0)
