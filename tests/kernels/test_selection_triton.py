"""select_top_entropy as a radix select in Triton: the same bits as the sorts."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rft_kernels import reference
from rft_kernels import select_top_entropy as select_by_any_backend
from rft_kernels.selection import torch_backend

from tests.kernels.kernel_cases import seeded
from tests.kernels.launches import compiled

pytest.importorskip("triton", reason="triton is not installed")
from rft_kernels.selection import triton_backend  # noqa: E402

select_top_entropy = partial(select_by_any_backend, backend="triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
ORDERS = ("high", "low", "random")
SEED = 2**63 + 2**31 + 7  # both words have their highest bit set
LEVELS = st.sampled_from([-0.0, 0.0, 0.25, -1.5, 3.0, 1e-40, torch.nan, torch.inf, -torch.inf])
TOKENS = st.lists(st.tuples(LEVELS, st.booleans()), max_size=40)
FRACTIONS = st.fractions(0, 1, max_denominator=1000) | st.sampled_from([0, 1, Fraction(1, 3)])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a program and several programs a pool at a few hundred tokens."""
    monkeypatch.setattr(triton_backend, "TILE", 16)
    monkeypatch.setattr(triton_backend, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(triton_backend, "SMALL_POOL", 0)


def sorted_select(entropy, candidates, fraction, cu_seqlens, order):
    return torch_backend.select(entropy, candidates, Fraction(fraction), cu_seqlens, order, SEED)


def columns(tokens):
    candidates = torch.tensor([candidate for _, candidate in tokens], dtype=torch.bool)
    return torch.tensor([value for value, _ in tokens]).to(DEVICE), candidates.to(DEVICE)


@settings(max_examples=12)
@given(TOKENS, FRACTIONS, st.sampled_from(ORDERS))
def test_pool_equals_the_sorts_and_the_specification(tokens, fraction, order):
    entropy, candidates = columns(tokens)
    options = {"fraction": fraction, "order": order}
    kept = select_top_entropy(entropy, candidates, seed=SEED, **options)
    assert torch.equal(kept, sorted_select(entropy, candidates, fraction, None, order))
    num = int(candidates.sum())
    assert (
        kept.sum() == num - int(num * (1 - Fraction(fraction))) and not (kept & ~candidates).any()
    )
    if order != "random":
        assert torch.equal(kept, reference.select_top_entropy(entropy, candidates, **options))


@settings(max_examples=12)
@given(st.lists(TOKENS, max_size=4), FRACTIONS, st.sampled_from(ORDERS))
def test_sequences_equal_the_sorts(sequences, fraction, order):
    entropy, candidates = columns([token for tokens in sequences for token in tokens])
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).int().to(DEVICE)
    options = {"fraction": fraction, "order": order, "seed": SEED}
    kept = select_top_entropy(entropy, candidates, cu_seqlens=bounds, **options)
    assert torch.equal(kept, sorted_select(entropy, candidates, fraction, bounds, order))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tied", [0.0, 0.3, 1.0])
def test_many_programs_with_ties(order, tied):
    rand = seeded(1)
    entropy = torch.randn(150, generator=rand)
    entropy[torch.rand(150, generator=rand) < tied] = 0.7
    candidates = (torch.rand(150, generator=rand) > 0.3).to(DEVICE)
    entropy = entropy.to(DEVICE)
    for fraction in (0, Fraction(1, 3), 1):
        options = {"fraction": fraction, "order": order, "seed": SEED}
        kept = select_top_entropy(entropy, candidates, **options)
        assert torch.equal(kept, sorted_select(entropy, candidates, fraction, None, order))
        assert torch.equal(kept, select_top_entropy(entropy, candidates, **options))
    nothing = torch.zeros_like(candidates)
    assert not select_top_entropy(entropy, nothing, fraction=1, order=order, seed=SEED).any()


@pytest.mark.parametrize("order", ["high", "low"])
def test_infinities_rank_before_nan_and_zeros_are_equal(order):
    worst = -torch.inf if order == "high" else torch.inf
    zeros = [-0.0, 0.0] if order == "high" else [0.0, -0.0]
    entropy = torch.tensor([torch.nan, worst, *zeros], device=DEVICE)
    mask = torch.ones_like(entropy, dtype=torch.bool)
    for num, kept in ((1, [False, False, True, False]), (3, [False, True, True, True])):
        found = select_top_entropy(entropy, mask, fraction=num / 4, order=order)
        assert found.tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_strides(dtype):
    entropy = torch.rand(200, 2, generator=seeded(2)).to(DEVICE, dtype)[:, 1]
    candidates = torch.rand(200, 3, generator=seeded(3)).to(DEVICE)[:, 0] > 0.4
    kept = select_top_entropy(entropy, candidates)
    assert torch.equal(kept, sorted_select(entropy, candidates, "1/5", None, "high"))
    same = select_top_entropy(entropy[:1].expand(200), candidates)
    assert same.nonzero().flatten().equal(candidates.nonzero().flatten()[: same.sum()])


def test_compiles_into_one_graph():
    entropy, mask = torch.rand(60, device=DEVICE), torch.rand(60, device=DEVICE) > 0.5
    torch._dynamo.reset()
    select = torch.compile(select_top_entropy, backend="aot_eager", fullgraph=True)
    assert torch.equal(select(entropy, mask), select_top_entropy(entropy, mask))


def test_the_op_is_registered_as_it_behaves():
    entropy, mask = torch.rand(60, device=DEVICE), torch.rand(60, device=DEVICE) > 0.5
    bounds = torch.tensor([0, 9, 60], device=DEVICE)
    for cu_seqlens in (None, bounds):
        arguments = (entropy, mask, cu_seqlens, "1/5", "high", "0")
        torch.library.opcheck(torch.ops.rft_kernels.select_top_entropy, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: nothing to wait for, nothing to capture")
@pytest.mark.parametrize("order", ORDERS)
def test_no_synchronisation_and_capture(order):
    entropy = torch.rand(1000, device=DEVICE)
    mask = torch.rand(1000, device=DEVICE) > 0.5
    options = {"order": order, "seed": 3}
    expected = select_top_entropy(entropy, mask, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_top_entropy(entropy, mask, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = select_top_entropy(entropy, mask, **options)
    graph.replay()
    assert torch.equal(kept, expected)
    entropy.copy_(entropy.flip(0))
    graph.replay()
    assert torch.equal(kept, select_top_entropy(entropy, mask, **options))


LAUNCHES = """
import torch
from fractions import Fraction
from functools import partial
from rft_kernels.selection import triton_backend
mask, bounds = torch.zeros(9) > 0, torch.tensor([0, 4, 9])
class Ranks:
    def add(self, counts): pass
    def add_and_rank(self, counts): return counts
for order in ("high", "random"):
    x = torch.zeros(9)
    triton_backend.select_pool(x, mask, Fraction(1, 5), order, 2**40 + 1)
    triton_backend.select_pool(x.bfloat16(), mask, Fraction(1, 5), order, 3, Ranks())
    for cu_seqlens in (None, bounds):
        triton_backend.select_sequences(x, mask, Fraction(1, 5), cu_seqlens, order, 3)
"""


@pytest.mark.slow
def test_compiles_for_hopper():
    names = compiled(LAUNCHES)
    assert names.count("_histogram_kernel") == 4 * names.count("_keep_kernel") == 16
    assert names.count("_count_kernel") == 2 and names.count("_sequences_kernel") == 4
