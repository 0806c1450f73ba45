"""Selection in torch: three stable sorts, O(T log T), and over ranks a radix select (E3).

T tokens, B sequences. Nothing is read on the host.
"""

from fractions import Fraction

import torch
from torch import Tensor

from .ranks import Ranks


def select(
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


def select_over_ranks(
    entropy: Tensor,  # [T]
    candidates: Tensor,  # [T]
    fraction: Fraction,
    order: str,
    seed: int,
    ranks: Ranks,
) -> Tensor:
    """The radix select of `triton_backend`, in torch: eight bits at a time from the highest."""
    if order == "random":
        index = candidates.cumsum(0) - 1
        keys = _random_keys(index + ranks.add_and_rank(candidates.sum().view(1)), seed)
    else:
        keys = _ordered_keys(entropy, order)
    shifts = range(8 * keys.element_size() - 8, -1, -8)
    keys = keys.long()
    base = keys.new_full((), -128)  # offset of the highest digit, which is signed
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
