"""select_top_entropy: exact counts, ties, pools, orders, ranks."""

import contextlib
import os
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from rft_kernels import _dispatch, reference, select_top_entropy

from tests.kernels.kernel_cases import seeded

FRACTIONS = st.fractions(0, 1, max_denominator=1000) | st.sampled_from([0.2, 0.1, 0.29, 1.0, 0])
LEVELS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, torch.nan, torch.inf])  # few values: many ties
TOKENS = st.lists(st.tuples(LEVELS, st.booleans()), max_size=40)


def columns(tokens):
    values = torch.tensor([value for value, _ in tokens])
    return values, torch.tensor([candidate for _, candidate in tokens], dtype=torch.bool)


def num_kept(num_candidates: int, fraction) -> int:
    return num_candidates - int(num_candidates * (1 - Fraction(str(fraction))))


@given(TOKENS, FRACTIONS, st.sampled_from(["high", "low"]))
def test_equals_the_specification(tokens, fraction, order):
    entropy, candidates = columns(tokens)
    options = {"fraction": fraction, "order": order}
    kept = select_top_entropy(entropy, candidates, **options)
    assert torch.equal(kept, reference.select_top_entropy(entropy, candidates, **options))
    assert kept.sum() == num_kept(int(candidates.sum()), fraction)


@given(st.lists(TOKENS, max_size=5), st.sampled_from(["high", "low", "random"]))
def test_a_sequence_does_not_depend_on_its_neighbours(sequences, order):
    options = {"order": order, "seed": 7 if order == "random" else None, "fraction": "0.3"}
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    packed = columns([token for tokens in sequences for token in tokens])
    kept = select_top_entropy(*packed, cu_seqlens=bounds.int(), **options)
    for tokens, part in zip(sequences, kept.split(list(map(len, sequences))), strict=True):
        assert torch.equal(part, select_top_entropy(*columns(tokens), **options))


def test_counts_are_exact_where_a_float_product_is_not():
    mask = torch.ones(1000, dtype=torch.bool)
    for share in range(0, 1001, 7):
        for fraction in (Fraction(share, 1000), share / 1000, str(share / 1000)):
            assert select_top_entropy(torch.rand(1000), mask, fraction=fraction).sum() == share


def test_a_seed_is_of_no_effect_but_on_a_random_order():
    entropy, mask = torch.rand(9, generator=seeded(3)), torch.ones(9, dtype=torch.bool)
    for order in ("high", "low"):
        kept = select_top_entropy(entropy, mask, order=order, seed=5)
        assert torch.equal(kept, select_top_entropy(entropy, mask, order=order))


@pytest.mark.parametrize("order", ["high", "low"])
def test_infinities_rank_before_nan_and_zeros_are_equal(order):
    worst = -torch.inf if order == "high" else torch.inf
    zeros = [-0.0, 0.0] if order == "high" else [0.0, -0.0]
    entropy = torch.tensor([torch.nan, worst, *zeros])
    mask = torch.ones(4, dtype=torch.bool)
    for num, kept in ((1, [False, False, True, False]), (3, [False, True, True, True])):
        found = select_top_entropy(entropy, mask, fraction=num / 4, order=order)
        assert found.tolist() == kept


@pytest.mark.parametrize("order", ["high", "low"])
def test_nan_ranks_last(order):
    entropy = torch.tensor([torch.nan, 1.0, torch.nan, 2.0])
    mask = torch.ones(4, dtype=torch.bool)
    half = select_top_entropy(entropy, mask, fraction=0.5, order=order)
    assert half.tolist() == [False, True, False, True]
    more = select_top_entropy(entropy, mask, fraction=0.75, order=order)
    assert more.tolist() == [True, True, False, True]


def test_random_is_uniform_seeded_and_blind_to_entropy_and_padding():
    mask = torch.ones(4000, dtype=torch.bool)
    entropy = torch.rand(4000, generator=seeded(0))
    options = {"order": "random", "fraction": 0.25}
    first = select_top_entropy(entropy, mask, seed=1, **options)
    assert first.sum() == 1000
    assert torch.equal(first, select_top_entropy(-entropy, mask, seed=1, **options))
    for seed in (2, 2**40 + 1):
        other = select_top_entropy(entropy, mask, seed=seed, **options)
        assert abs(int((first & other).sum()) - 250) < 60
    for part in first.split(400):
        assert abs(int(part.sum()) - 100) < 40
    padded_mask = torch.zeros(8000, dtype=torch.bool)
    padded_mask[::2] = True
    padded = select_top_entropy(torch.rand(8000), padded_mask, seed=1, **options)
    assert torch.equal(padded[::2], first)


def test_any_shape_is_one_pool():
    entropy = torch.rand(6, 5, generator=seeded(4))
    mask = torch.rand(6, 5, generator=seeded(5)) > 0.3
    kept = select_top_entropy(entropy, mask)
    assert torch.equal(kept.flatten(), select_top_entropy(entropy.flatten(), mask.flatten()))


def test_entropy_gets_no_gradient():
    kept = select_top_entropy(torch.rand(5, requires_grad=True), torch.ones(5, dtype=torch.bool))
    assert not kept.requires_grad


class NothingRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host waits for an element of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def select_on_ranks(rank: int, store: str, sizes: list[int], cases, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=len(sizes))
    for name, (entropy, candidates, options) in cases.items():
        own = [x.split(sizes)[rank] for x in (entropy, candidates)]
        with contextlib.nullcontext() if "backend" in options else NothingRead():
            results[name, rank] = select_top_entropy(
                *own, process_group=dist.group.WORLD, **options
            )
    dist.barrier()  # a rank that leaves while the other still talks to it can end in an abort
    os._exit(0)  # a torn down interpreter can abort on a thread of the process group


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[13, 29], [0, 42], [42, 0]], ids=str)
def test_two_ranks_are_one_pool(sizes, tmp_path):
    levels = torch.randint(-2, 6, (42,), generator=seeded(1)) / 3
    levels[::9] = torch.nan
    candidates = torch.rand(42, generator=seeded(2)) > 0.4
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and _dispatch._HAS_TRITON
    cases = {}
    for order in ("high", "low", "random"):
        for fraction in ("1/5", "2/3", "1"):
            options = {"order": order, "seed": 2**33 + 3, "fraction": Fraction(fraction)}
            for dtype in (torch.float32, torch.float64):
                cases[order, fraction, dtype] = (levels.to(dtype), candidates, options)
            if interpreted and fraction == "2/3":
                in_triton = options | {"backend": "triton"}
                cases[order, "Triton"] = (levels, candidates, in_triton)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(select_on_ranks, (str(tmp_path / "store"), sizes, cases, results), nprocs=2)
        for name, (entropy, candidates, options) in cases.items():
            whole = select_top_entropy(entropy, candidates, **options)
            assert torch.equal(torch.cat([results[name, rank] for rank in (0, 1)]), whole), name
