"""token_stats on Triton kernels against the specification: compiled on a GPU, else interpreted."""

from types import SimpleNamespace

import pytest
import torch
from rft_kernels import _dispatch, reference, token_stats
from rft_kernels.rows import Slopes, torch_backend
from rft_kernels.rows import launch as launches
from torch import Tensor

from tests.kernels.kernel_cases import CASES, assert_as_exact, seeded
from tests.kernels.triton_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    TILE,
    arange,
    equal,
    logits_case,
    scalars_for,
    triton_backend,
)

pytestmark = [  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU: too large for the interpreter")


def run(op, logits: Tensor, targets: Tensor, scalars: Tensor, **options) -> tuple[Tensor, ...]:
    """log_probs, entropy and the gradient of <scalars, (log_probs, entropy)> by the logits."""
    logits = logits.detach().requires_grad_()
    found = op(logits, targets, **options)
    total = sum((s.to(x.dtype) * x).sum() for s, x in zip(scalars, found, strict=True))
    return *found, torch.autograd.grad(total, logits)[0]


def triton(logits: Tensor, targets: Tensor, scalars: Tensor, **options) -> tuple[Tensor, ...]:
    return run(token_stats, logits, targets, scalars, backend="triton", **options)


def compare(logits: Tensor, targets: Tensor, **options) -> None:
    scalars = scalars_for(targets)
    ours = triton(logits, targets, scalars, **options)
    same = run(reference.token_stats, logits, targets, scalars, **options)
    truth = run(reference.token_stats, logits.double(), targets, scalars, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == logits.dtype
    for x, y, z in zip(ours, same, truth, strict=True):
        assert_as_exact(x, y, z)


@pytest.mark.parametrize("case", ["normal", "peaked", "huge"])
def test_softcap(case, small_tiles):
    targets = torch.randint(40, 67, (13,), generator=seeded(2)).to(DEVICE)
    compare(logits_case(case).float(), targets, softcap=3.0, temperature=0.7)


def test_softcap_of_minus_infinity(small_tiles):
    targets = torch.randint(40, 67, (13,), generator=seeded(2)).to(DEVICE)
    arguments = (logits_case("tile of -inf"), targets, scalars_for(targets))
    ours = triton(*arguments, softcap=3.0, temperature=0.7)
    truth = run(reference.token_stats, *arguments, softcap=3.0, temperature=0.7)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per row"])
@pytest.mark.parametrize("case", [*CASES, "tile of -inf", "only the last"])
def test_as_exact_as_torch(case, per_row, dtype, small_tiles):
    logits = logits_case(case).to(dtype)
    targets = torch.randint(40, 67, (13,), generator=seeded(2)).to(DEVICE)
    targets[4] = -100
    temperature = torch.linspace(0.5, 2, 13, device=DEVICE) if per_row else 0.7
    compare(logits, targets, temperature=temperature)


@pytest.mark.parametrize("num_classes", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 5 * TILE - 1])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_shapes(num_rows, num_classes, small_tiles):
    logits = logits_case("normal", num_rows, num_classes).float()
    compare(logits, (arange(num_rows) % num_classes).int())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("beside", [-1, 0, 1])
@pytest.mark.parametrize("entry", [0, 1])
def test_committed_launches(entry, beside, dtype, monkeypatch):
    _, launch = launches.TABLES[9][dtype.itemsize][entry]
    monkeypatch.setattr(triton_backend, "row_launch", lambda logits: launch)
    num_classes = launch.lanes * launch.depth + beside
    logits = logits_case("normal", 3, num_classes).to(dtype) * 3
    compare(logits, torch.tensor([0, num_classes - 1, num_classes // 2], device=DEVICE))


def test_launch_table_serves_every_row():
    for num_classes, dtype in ((1, torch.float16), (10**6, torch.float64)):
        logits = torch.empty(1, num_classes, dtype=dtype, device=DEVICE)
        assert isinstance(launches.row_launch(logits), launches.RowLaunch)
    for table in launches.TABLES.values():
        for entries in table.values():
            widths = [widest for widest, _ in entries]
            assert widths == sorted(widths) and widths[-1] > 2**40


def test_entropy_has_no_sign(small_tiles):
    for logits in (
        logits_case("normal", 3, 1),
        logits_case("normal") * 1e3,
        logits_case("peaked") * 9,
    ):
        entropy = token_stats(logits.float(), arange(len(logits)) * 0, backend="triton").entropy
        assert not entropy.signbit().any() and entropy.min() < 1e-6


def test_target_of_probability_zero(small_tiles):
    logits, targets = logits_case("one -inf").float(), arange(13) * 0
    log_probs, entropy, gradient = triton(logits, targets, torch.ones(2, 13, device=DEVICE))
    assert (log_probs == -torch.inf).all() and entropy.isfinite().all()
    assert gradient.isfinite().all() and (gradient[:, 0] == 1).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("column", [0, TILE, 66])
def test_what_is_not_a_number_is_not_hidden(column, softcap, small_tiles):
    logits = logits_case("normal").float()
    logits[3, column] = torch.nan
    logits[4, column] = torch.inf
    valid = torch.ones(13, dtype=torch.bool, device=DEVICE)
    found, same = (
        backend.row_stats(logits, arange(13), valid, 1.0, softcap, 2**20)
        for backend in (triton_backend, torch_backend)
    )
    for x, y in zip(found[:3], same[:3], strict=True):
        assert torch.equal(x.isnan(), y.isnan()) and x[3].isnan()


def test_row_without_any_class_has_no_statistics(small_tiles):
    logits = torch.full((2, 67), -torch.inf, device=DEVICE)
    for x in token_stats(logits, arange(2), backend="triton"):
        assert x.isnan().all()


def test_a_target_that_is_no_class_is_not_read(small_tiles):
    logits, targets = logits_case("normal", 4).float(), torch.tensor([66, 67, -1, 2**40])
    valid = torch.ones(4, dtype=torch.bool, device=DEVICE)
    found = triton_backend.row_stats(logits, targets.to(DEVICE), valid, 1.0, None, 0)
    assert found.log_probs.isnan().tolist() == [False, True, True, True]
    assert found.entropy.isfinite().all() and found.lse.isfinite().all()


@pytest.mark.parametrize("width", [1, TILE - 1, TILE, 67])
def test_padded_columns_are_no_part_of_anything(width, small_tiles):
    logits = logits_case("normal", 13, width).float()
    padded = torch.cat([logits, torch.full((13, 5), torch.nan, device=DEVICE)], 1)
    targets = arange(13) % width
    scalars = scalars_for(targets)
    plain = triton(logits, targets, scalars)
    cut = triton(padded, targets, scalars, vocab_size=width)
    assert equal(cut[:2], plain[:2])
    assert torch.equal(cut[2][:, :width], plain[2]) and (cut[2][:, width:] == 0).all()


def test_rows_without_output_are_no_part_of_anything(small_tiles):
    logits, targets = logits_case("normal").float(), arange(13)
    row_mask = arange(13) % 3 != 0
    targets[4] = -100
    targets[0] = 10**6  # masked, so never looked at
    logits[::3] = torch.nan
    logits[4] = torch.nan
    valid = row_mask & (targets != -100)
    scalars = torch.where(valid, scalars_for(targets), torch.nan)
    found = triton(logits, targets, scalars, row_mask=row_mask)
    assert all((x[~valid] == 0).all() for x in found)
    assert equal(
        [x[valid] for x in found], triton(logits[valid], targets[valid], scalars[:, valid])
    )


def test_rows_without_gradient_are_not_read_again(small_tiles):
    logits, targets = logits_case("normal").float().requires_grad_(), arange(13)
    scalars = scalars_for(targets).float()
    dead = arange(13) % 4 == 1
    scalars[:, dead] = 0
    total = (torch.stack(tuple(token_stats(logits, targets, backend="triton"))) * scalars).sum()
    (expected,) = torch.autograd.grad(total, logits, retain_graph=True)
    with torch.no_grad():
        logits.untyped_storage().copy_(
            torch.where(dead[:, None], torch.nan, logits).untyped_storage()
        )
    (found,) = torch.autograd.grad(total, logits)
    assert torch.equal(found, expected) and (found[dead] == 0).all() and (found[~dead] != 0).any()


def test_no_rows_and_only_masked_rows(small_tiles):
    empty = logits_case("normal", 0, 7).float()
    found = triton(empty, arange(0), torch.ones(2, 0, device=DEVICE))
    assert [x.shape for x in found] == [(0,), (0,), (0, 7)]
    masked = torch.full((3, 7), torch.nan, device=DEVICE)
    found = triton(masked, torch.full_like(arange(3), -100), torch.ones(2, 3, device=DEVICE))
    assert all((x == 0).all() for x in found)


STRIDED = {
    "strided rows": lambda x: x.repeat(1, 2)[:, : x.shape[1]],
    "strided columns": lambda x: x.t().contiguous().t(),
    "every other class": lambda x: torch.stack([x, x * torch.nan], -1).flatten(1)[:, ::2],
    "shifted [B, L, V]": lambda x: torch.stack([x, x], 0)[:, :-1],
    "transposed [L, B, V]": lambda x: torch.stack([x, x], 0).transpose(0, 1),
    "no leading dimension": lambda x: x[0],
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strides_do_not_show(make, small_tiles):
    logits = make(logits_case("normal", 5).float())
    targets = torch.randint(67, logits.shape[:-1], generator=seeded(0)).to(DEVICE)
    scalars = scalars_for(targets)
    whole = logits.clone(memory_format=torch.contiguous_format)
    assert equal(triton(logits, targets, scalars), triton(whole, targets, scalars))


def test_offsets_past_32_bits(small_tiles):
    stride = 2**30 + 8
    memory = torch.empty(2 * stride + 67, dtype=torch.bfloat16, device=DEVICE)  # hardly touched
    far = memory.as_strided((3, 67), (stride, 1))
    logits, targets = logits_case("normal", 3).bfloat16(), arange(3)
    far.copy_(logits)
    ones = torch.ones(3, device=DEVICE)
    stats = [triton_backend.row_stats(x, targets, ones.bool(), 1.0, None, 0) for x in (far, logits)]
    assert equal(*(x[:-1] for x in stats))
    saved = (stats[0].entropy, stats[0].saved)
    for x in (far, logits):
        triton_backend.row_grad(x, x, targets, 1.0, None, *saved, Slopes(ones, ones), 0)
    assert torch.equal(far, logits)


def test_inplace_backward_overwrites_the_logits(small_tiles):
    targets = arange(13)
    scalars = scalars_for(targets).float()
    scalars[:, 2] = 0
    logits = logits_case("normal").float()
    *_, expected = triton(logits, targets, scalars, vocab_size=60)
    leaf = logits.clone().requires_grad_()
    buffer = leaf * 1
    found = token_stats(buffer, targets, vocab_size=60, inplace_backward=True, backend="triton")
    (scalars[0] * found.log_probs + scalars[1] * found.entropy).sum().backward()
    assert torch.equal(leaf.grad, expected) and torch.equal(buffer.detach(), expected)


@pytest.fixture
def poisoned():
    """`torch.empty` is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_everything_is_written(poisoned, small_tiles):
    logits, targets = logits_case("normal").float(), arange(13)
    targets[::2] = -100
    for x in triton(logits, targets, scalars_for(targets), vocab_size=41):
        assert x.isfinite().all()
    valid = targets != -100
    found = triton_backend.row_stats(logits, targets, valid, 1.0, None, 0, squares=True)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_depend_on_the_row_alone(dtype, small_tiles):
    logits, targets = logits_case("normal").to(dtype), arange(13)
    scalars = scalars_for(targets)
    found = triton(logits, targets, scalars)
    assert equal(found, triton(logits, targets, scalars))
    for rows in ([5], [12, 3], list(range(12, -1, -1))):
        part = triton(logits[rows], targets[rows], scalars[:, rows])
        assert equal(part, [x[rows] for x in found])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 2.0, 3.0])], ids=str)
def test_gradients_in_float64(temperature, softcap, small_tiles):
    logits, targets = logits_case("normal", 4, TILE + 6), torch.tensor([0, -100, 34, 2])
    targets, valid = targets.to(DEVICE), torch.tensor([True, False, True, False], device=DEVICE)
    if isinstance(temperature, Tensor):
        temperature = temperature.double().to(DEVICE)
    arguments = (targets, valid, temperature, softcap, 0)
    stats = triton_backend.row_stats(logits, *arguments, squares=True)
    g, h = torch.where(valid, scalars_for(targets), 0)
    c, q = torch.where(valid, scalars_for(targets, seed=4), 0)
    slopes = Slopes(g, h, c - 2 * q * stats.squares, 2 * q)
    found = torch.empty_like(logits)
    saved = (stats.entropy, stats.saved)
    triton_backend.row_grad(found, logits, targets, temperature, softcap, *saved, slopes, 0)

    def total(x: Tensor) -> Tensor:
        log_probs, entropy, lse, _, squares = triton_backend.row_stats(x, *arguments, squares=True)
        return (g * log_probs + h * entropy + c * lse + q * squares).sum()

    step = 1e-5
    for row, column in [(0, 0), (0, 5), (1, 3), (2, 34), (2, 37), (3, 2)]:
        bump = torch.zeros_like(logits)
        bump[row, column] = step
        slope = (total(logits + bump) - total(logits - bump)) / (2 * step)
        torch.testing.assert_close(found[row, column], slope, atol=1e-9, rtol=1e-7)
    same = torch_backend.row_stats(logits, targets, valid, temperature, softcap, 2**20, True)
    for name in ("log_probs", "entropy", "lse", "squares"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(same, name), atol=1e-12, rtol=1e-12
        )


def test_gradcheck(small_tiles):
    logits, targets = logits_case("normal", 3, 6).requires_grad_(), arange(3)
    targets[1] = -100

    def stats(x):
        return tuple(token_stats(x, targets, temperature=0.7, vocab_size=5, backend="triton"))

    assert torch.autograd.gradcheck(stats, [logits])


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_output_used(which, small_tiles):
    logits, targets = logits_case("normal").requires_grad_(), arange(13)
    ours, same = (
        torch.autograd.grad(op(logits, targets, **options)[which].sum(), logits)[0]
        for op, options in ((token_stats, {"backend": "triton"}), (reference.token_stats, {}))
    )
    torch.testing.assert_close(ours, same, atol=1e-12, rtol=1e-10)


def test_custom_ops_are_registered_as_they_behave(small_tiles):
    logits, targets = logits_case("normal", 4, 6).requires_grad_(), arange(4)
    ops = torch.ops.rft_kernels
    for squares in (False, True):
        forward = (logits, targets, targets != 2, None, 0.7, 3.0, 5, False, squares, "triton")
        torch.library.opcheck(ops.token_stats, forward)
    _, entropy, _, saved, _ = ops.token_stats(*forward)
    scalars = [torch.where(targets != 2, scalars_for(targets, i)[0], 0) for i in range(4)]
    saved_rows = (entropy.detach(), saved.detach(), *scalars)
    backward = (targets, None, 0.7, 3.0, 5, "triton", *saved_rows)
    torch.library.opcheck(ops.token_stats_bwd, (logits.detach(), *backward))
    torch.library.opcheck(ops.token_stats_bwd_, (logits.detach().clone(), *backward))


def test_backends_go_by_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert _dispatch.resolve("auto", cpu) == "torch" == _dispatch.resolve("torch", cuda)
    assert _dispatch.resolve("auto", cuda) == "triton" == _dispatch.resolve("triton", cuda)
    for dtype, served in ((torch.float64, "torch"), (torch.bfloat16, "triton")):
        like = SimpleNamespace(device=cuda, dtype=dtype)
        assert _dispatch.resolve_for_tokens("auto", like) == served
        assert _dispatch.resolve_for_tokens("torch", like) == "torch"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend="triton")
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    assert _dispatch.resolve("auto", cuda) == "torch"
    with pytest.raises(ValueError, match="which is not installed"):
        _dispatch.resolve("triton", cuda)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_classes", [32_000, 50_257, 128_256, 151_936])
def test_vocabularies_of_models(num_classes, dtype):
    logits = logits_case("normal", 5, num_classes).to(dtype) * 3
    compare(logits, torch.randint(num_classes, (5,), generator=seeded(1)).cuda(), temperature=0.7)


@on_gpu
def test_more_than_65_535_rows():
    logits = logits_case("normal", 70_001, 130).bfloat16()
    compare(logits, arange(70_001) % 130)


@on_gpu
def test_more_than_2_to_the_31_logits():
    num_rows = 2**31 // 151_936 + 2
    logits = torch.randn(num_rows, 151_936, device="cuda", dtype=torch.bfloat16)
    targets = arange(num_rows)
    log_probs, entropy, gradient = triton(logits, targets, scalars_for(targets))
    last = slice(num_rows - 3, num_rows)
    alone = triton(logits[last], targets[last], scalars_for(targets)[:, last])
    assert equal((log_probs[last], entropy[last], gradient[last]), alone)


@on_gpu
@pytest.mark.parametrize("temperature", [0.7, None], ids=["scalar", "per row"])
def test_neither_waits_for_the_device_nor_needs_it_to_capture(temperature):
    logits, targets = logits_case("normal", 64, 5000).bfloat16().requires_grad_(), arange(64)
    if temperature is None:
        temperature = torch.linspace(0.5, 2, 64, device="cuda")
    scalars = scalars_for(targets).float()

    def step():
        found = token_stats(logits, targets, temperature=temperature)
        total = (torch.stack(tuple(found)) * scalars).sum()
        return *found, torch.autograd.grad(total, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for x in found:
        x.detach().fill_(torch.nan)
    graph.replay()
    assert equal(found, expected)
