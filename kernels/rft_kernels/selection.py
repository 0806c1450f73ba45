"""Which prefix tokens are learnt from: the top fraction of the candidates by entropy (E3).

T tokens, B sequences. In torch three stable sorts, O(T log T); on a CUDA device, and over ranks
anywhere, a radix select, O(T).
"""

from fractions import Fraction
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check
from ._tokens import uses_triton

FIFTH = Fraction(1, 5)
_ORDERS = ("high", "low", "random")
_INT64_MAX = 2**63 - 1
_MAX_POOL_OVER_RANKS = 2**40  # tokens; the real number is not known on the host


def select_top_entropy(
    entropy: Tensor,
    candidate_mask: Tensor,
    *,
    fraction: Fraction | float | str = FIFTH,
    cu_seqlens: Tensor | None = None,
    order: str = "high",
    seed: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Keeps exactly k of the n candidates of each pool, by entropy.

        k = n - floor(n (1 - fraction))     in integers

    Args:
        entropy: [...] float, nats; of no effect outside `candidate_mask`. A NaN ranks last in
            either order.
        candidate_mask: [...] bool.
        fraction: share to keep, 0 to 1. A float or text means its decimal value: 0.2 is 1/5.
        cu_seqlens: [B + 1] int, 0 to T: one pool per sequence of the flattened tokens. None: one
            pool.
        order: "high" or "low" entropy first, or "random" (drawn from `seed` and the place of a
            candidate among the candidates of its pool, so it does not depend on packing).
        seed: integer, at least 0; needed for "random", ignored otherwise.
        process_group: one pool over its ranks, in rank order; not together with `cu_seqlens`.
    Returns:
        [...] bool, a subset of `candidate_mask`. Ties go to the earlier position.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    Not differentiable. Deterministic. No host synchronisation. On a CUDA device a few launches of
    Triton, except for float64.
    """
    _check.tensor("entropy", entropy)
    _check.mask("candidate_mask", candidate_mask, entropy)
    fraction = check_fraction(
        fraction, entropy.numel() if process_group is None else _MAX_POOL_OVER_RANKS
    )
    _check.one_of("order", order, _ORDERS)
    if order == "random":
        _check.integer("seed", seed, least=0)
    else:
        seed = 0
    if cu_seqlens is not None:
        _check.cu_seqlens(cu_seqlens, entropy.numel(), entropy)
        if process_group is not None:
            raise ValueError("cu_seqlens and process_group exclude each other: sequences are local")
    values, candidates = entropy.detach().reshape(-1), candidate_mask.reshape(-1)
    on_device = uses_triton(values)
    if process_group is not None:
        select = _select_over_ranks
        if on_device:
            from .selection_triton import select_pool as select
        kept = select(values, candidates, fraction, order, seed, _Ranks(process_group))
    elif on_device:
        # As text: a seed may be wider than an op's integer, and a fraction is exact.
        kept = _select_on_device(values, candidates, cu_seqlens, str(fraction), order, str(seed))
    else:
        kept = _select(values, candidates, fraction, cu_seqlens, order, seed)
    return kept.view(entropy.shape)


def check_fraction(fraction: Fraction | float | str, num_tokens: int) -> Fraction:
    """The exact fraction meant; refuses one whose product with `num_tokens` would not fit int64."""
    if isinstance(fraction, bool) or not isinstance(fraction, Fraction | int | float | str):
        raise TypeError(f"fraction must be a Fraction or number, got {type(fraction).__name__}")
    exact = fraction if isinstance(fraction, Fraction) else Fraction(str(fraction))
    if not 0 <= exact <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if num_tokens * exact.denominator > _INT64_MAX:
        raise ValueError(f"fraction {exact} has too large a denominator for {num_tokens} tokens")
    return exact


@torch.library.custom_op("rft_kernels::select_top_entropy", mutates_args=())
def _select_on_device(
    entropy: Tensor,  # [T]
    candidates: Tensor,  # [T]
    cu_seqlens: Tensor | None,  # [B + 1]
    fraction: str,
    order: str,
    seed: str,
) -> Tensor:
    from . import selection_triton

    arguments = (entropy, candidates, Fraction(fraction))
    one_pool = cu_seqlens is None or len(cu_seqlens) == 2
    if one_pool and len(entropy) > selection_triton.SMALL_POOL:
        return selection_triton.select_pool(*arguments, order, int(seed))
    return selection_triton.select_sequences(*arguments, cu_seqlens, order, int(seed))


@_select_on_device.register_fake
def _(entropy, candidates, *_):
    return torch.empty_like(candidates, memory_format=torch.contiguous_format)


def _select(
    entropy: Tensor,  # [T]
    candidates: Tensor,  # [T]
    fraction: Fraction,
    cu_seqlens: Tensor | None,  # [B + 1]
    order: str,
    seed: int,
) -> Tensor:
    num_tokens = len(entropy)
    if cu_seqlens is None:
        bounds = torch.arange(2, device=entropy.device) * num_tokens
    else:
        bounds = cu_seqlens.long()
    positions = torch.arange(num_tokens, device=entropy.device)
    pool = torch.bucketize(positions, bounds[1:], right=True)
    before = torch.nn.functional.pad(candidates.cumsum(0), (1, 0))
    if order == "random":
        keys = _random_keys(before[:-1] - before[bounds[pool]], seed)
    else:
        keys = _ordered_keys(entropy, order)
    # Least significant key first: stable sorts keep the earlier position first among equals.
    ranked = keys.argsort(stable=True)
    ranked = ranked[(~candidates)[ranked].argsort(stable=True)]
    ranked = ranked[pool[ranked].argsort(stable=True)]

    num_kept = _num_kept(before[bounds].diff(), fraction)
    pool = pool[ranked]
    kept = torch.empty_like(candidates)
    kept[ranked] = positions - bounds[pool] < num_kept[pool]
    return kept


def _num_kept(num_candidates: Tensor, fraction: Fraction) -> Tensor:
    dropped = 1 - fraction
    return num_candidates - num_candidates * dropped.numerator // dropped.denominator


def _ordered_keys(entropy: Tensor, order: str) -> Tensor:
    """Signed integers as wide as the entropy (32 bits at least), the smallest kept first."""
    values = entropy if entropy.dtype == torch.float64 else entropy.float()
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    most = torch.iinfo(integer).max
    bits = torch.where(values == 0, 0, values).view(integer)  # -0 is 0
    ascending = torch.where(bits < 0, bits ^ most, bits)
    return torch.where(values.isnan(), most, ascending if order == "low" else ~ascending)


def _random_keys(index: Tensor, seed: int) -> Tensor:
    """32 well-mixed bits of each (index, seed): the finalizer of MurmurHash3 on both."""
    bits = index
    for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF):
        bits = (bits ^ word) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> shift) * factor & 0xFFFFFFFF
        bits = bits ^ bits >> 16
    return (bits - 2**31).int()


class _Ranks(NamedTuple):
    """Sums of counts over the ranks of a process group, in place; nothing is read on the host."""

    group: dist.ProcessGroup

    def add(self, counts: Tensor) -> None:
        dist.all_reduce(counts, group=self.group)

    def add_and_rank(self, counts: Tensor) -> Tensor:
        """Also returns the sum over the ranks before this one."""
        world_size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        rows = counts.new_empty(world_size, len(counts))
        dist.all_gather_into_tensor(rows.view(-1), counts, group=self.group)
        counts.copy_(rows.sum(0))
        return rows[:rank].sum(0)


def _select_over_ranks(
    entropy: Tensor,  # [T]
    candidates: Tensor,  # [T]
    fraction: Fraction,
    order: str,
    seed: int,
    ranks: _Ranks,
) -> Tensor:
    """The radix select of `selection_triton`, in torch: eight bits at a time from the highest."""
    if order == "random":
        index = candidates.cumsum(0) - 1
        keys = _random_keys(index + ranks.add_and_rank(candidates.sum().view(1)), seed)
    else:
        keys = _ordered_keys(entropy, order)
    shifts = range(8 * keys.element_size() - 8, -1, -8)
    keys = keys.long()
    base = keys.new_full((), -128)  # of the highest digit, which is signed
    left = earlier_ties = None
    for shift in shifts:
        digits = (keys >> shift) - base
        matching = candidates & (digits >= 0) & (digits < 256)
        counts = keys.new_zeros(256).scatter_add_(0, digits.clamp(0, 255), matching.long())
        if shift:
            ranks.add(counts)
        else:
            earlier_ties = ranks.add_and_rank(counts)
        if left is None:
            left = _num_kept(counts.sum(), fraction)
        below = counts.cumsum(0) < left
        left = left - torch.where(below, counts, 0).sum()
        digit = below.sum()
        threshold = base + digit
        base = threshold << 8
    ties = candidates & (keys == threshold)
    place = ties.cumsum(0) + earlier_ties.gather(0, digit.view(1))
    return (candidates & (keys < threshold)) | (ties & (place <= left))
