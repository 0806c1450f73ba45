"""The radix select of select_top_entropy in Triton's interpreter: the same bits as the sorts."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import seeded
from rft_kernels import _tokens, reference, select_top_entropy, selection

pytest.importorskip("triton")
from rft_kernels import selection_triton  # noqa: E402

ORDERS = ("high", "low", "random")
SEED = 2**63 + 2**31 + 7  # both words have their highest bit set
LEVELS = st.sampled_from([-0.0, 0.0, 0.25, -1.5, 3.0, 1e-40, torch.nan, torch.inf, -torch.inf])
TOKENS = st.lists(st.tuples(LEVELS, st.booleans()), max_size=40)
FRACTIONS = st.fractions(0, 1, max_denominator=1000) | st.sampled_from([0, 1, Fraction(1, 3)])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a program and several programs a pool at a few hundred tokens."""
    monkeypatch.setattr(selection_triton, "TILE", 16)
    monkeypatch.setattr(selection_triton, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(selection_triton, "SMALL_POOL", 0)
    monkeypatch.setattr(_tokens, "_interpret", True)


def sorted_select(entropy, candidates, fraction, cu_seqlens, order):
    return selection._select(entropy, candidates, Fraction(fraction), cu_seqlens, order, SEED)


def columns(tokens):
    values = torch.tensor([value for value, _ in tokens])
    return values, torch.tensor([candidate for _, candidate in tokens], dtype=torch.bool)


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
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    options = {"fraction": fraction, "order": order, "seed": SEED}
    kept = select_top_entropy(entropy, candidates, cu_seqlens=bounds, **options)
    assert torch.equal(kept, sorted_select(entropy, candidates, fraction, bounds, order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tied", [0.0, 0.3, 1.0])
def test_many_programs_with_ties(order, tied):
    rand = seeded(1)
    entropy = torch.randn(150, generator=rand)
    entropy[torch.rand(150, generator=rand) < tied] = 0.7
    candidates = torch.rand(150, generator=rand) > 0.3
    for fraction in (0, Fraction(1, 3), 1):
        options = {"fraction": fraction, "order": order, "seed": SEED}
        kept = select_top_entropy(entropy, candidates, **options)
        assert torch.equal(kept, sorted_select(entropy, candidates, fraction, None, order))
        assert torch.equal(kept, select_top_entropy(entropy, candidates, **options))
    nothing = torch.zeros_like(candidates)
    assert not select_top_entropy(entropy, nothing, fraction=1, order=order, seed=SEED).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_strides(dtype):
    entropy = torch.rand(200, 2, generator=seeded(2)).to(dtype)[:, 1]
    candidates = torch.rand(200, 3, generator=seeded(3))[:, 0] > 0.4
    kept = select_top_entropy(entropy, candidates)
    assert torch.equal(kept, sorted_select(entropy, candidates, "1/5", None, "high"))
    same = select_top_entropy(entropy[:1].expand(200), candidates)
    assert same.nonzero().flatten().equal(candidates.nonzero().flatten()[: same.sum()])


def test_compiles_into_one_graph():
    entropy, mask = torch.rand(60), torch.rand(60) > 0.5
    torch._dynamo.reset()
    select = torch.compile(select_top_entropy, backend="aot_eager", fullgraph=True)
    assert torch.equal(select(entropy, mask), select_top_entropy(entropy, mask))


def test_the_op_is_registered_as_it_behaves():
    entropy, mask, bounds = torch.rand(60), torch.rand(60) > 0.5, torch.tensor([0, 9, 60])
    for cu_seqlens in (None, bounds):
        arguments = (entropy, mask, cu_seqlens, "1/5", "high", "0")
        torch.library.opcheck(selection._select_on_device, arguments)
