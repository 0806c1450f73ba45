"""Which prefix tokens are learnt from: the top fraction of the candidates by entropy (E3).

T tokens, B sequences. O(T log T) on the device, from sorts and running sums alone.
"""

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check

FIFTH = Fraction(1, 5)
_ORDERS = ("high", "low", "random")
_INT64_MAX = 2**63 - 1


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
        entropy: [...] float, nats; read where `candidate_mask` alone. A NaN ranks last in either
            order.
        candidate_mask: [...] bool.
        fraction: share to keep, 0 to 1. A float or text means its decimal value: 0.2 is 1/5.
        cu_seqlens: [B + 1] int, 0 to T: one pool per sequence of the flattened tokens. None: one
            pool.
        order: "high" or "low" entropy first, or "random" (drawn from `seed` and the place of a
            candidate among the candidates of its pool, so it does not depend on packing).
        seed: integer, for "random" alone.
        process_group: one pool over its ranks, in rank order; not together with `cu_seqlens`. The
            ranks' token counts are read on the host.
    Returns:
        [...] bool, a subset of `candidate_mask`. Ties go to the earlier position.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    Not differentiable. Deterministic. Without `process_group` there is no host synchronisation.
    """
    _check.tensor("entropy", entropy)
    _check.mask("candidate_mask", candidate_mask, entropy)
    fraction = check_fraction(fraction, entropy.numel())
    _check.one_of("order", order, _ORDERS)
    if (order == "random") != (seed is not None):
        raise ValueError(f"seed must be given for order 'random' alone, got {seed!r} for {order!r}")
    if seed is not None:
        _check.integer("seed", seed, least=0)
    if cu_seqlens is not None:
        _check.cu_seqlens(cu_seqlens, entropy.numel(), entropy)
        if process_group is not None:
            raise ValueError("cu_seqlens and process_group exclude each other: sequences are local")
    values, candidates = entropy.detach().reshape(-1), candidate_mask.reshape(-1)
    if process_group is None:
        kept = _select(values, candidates, fraction, cu_seqlens, order, seed)
    else:
        values, candidates, own = _gather(values, candidates, process_group)
        kept = _select(values, candidates, fraction, None, order, seed)[own]
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


def _select(
    entropy: Tensor,  # [T]
    candidates: Tensor,  # [T]
    fraction: Fraction,
    cu_seqlens: Tensor | None,  # [B + 1]
    order: str,
    seed: int | None,
) -> Tensor:
    num_tokens = len(entropy)
    if cu_seqlens is None:
        bounds = torch.tensor([0, num_tokens]).to(entropy.device, non_blocking=True)
    else:
        bounds = cu_seqlens.long()
    positions = torch.arange(num_tokens, device=entropy.device)
    pool = torch.bucketize(positions, bounds[1:], right=True)
    before = torch.nn.functional.pad(candidates.cumsum(0), (1, 0))
    if order == "random":
        keys = _hash(before[:-1] - before[bounds[pool]], seed)
    else:
        last = -torch.inf if order == "high" else torch.inf
        keys = torch.where(entropy.isnan(), last, entropy)
    # Least significant key first: stable sorts keep the earlier position first among equals.
    ranked = keys.argsort(descending=order == "high", stable=True)
    ranked = ranked[(~candidates)[ranked].argsort(stable=True)]
    ranked = ranked[pool[ranked].argsort(stable=True)]

    num_candidates = before[bounds].diff()
    dropped = 1 - fraction
    num_kept = num_candidates - num_candidates * dropped.numerator // dropped.denominator
    pool = pool[ranked]
    kept = torch.empty_like(candidates)
    kept[ranked] = positions - bounds[pool] < num_kept[pool]
    return kept


def _hash(index: Tensor, seed: int) -> Tensor:
    """32 well-mixed bits of each (index, seed): the finalizer of MurmurHash3 on both."""
    bits = index
    for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF):
        bits = (bits ^ word) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> shift) * factor & 0xFFFFFFFF
        bits = bits ^ bits >> 16
    return bits


def _gather(
    entropy: Tensor, candidates: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, slice]:
    """Entropy and candidates of all ranks in rank order, and which of them are this rank's."""
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = torch.empty(world_size, dtype=torch.int64, device=entropy.device)
    own_size = torch.full((1,), len(entropy), dtype=torch.int64, device=entropy.device)
    dist.all_gather_into_tensor(sizes, own_size, group=group)
    counts = sizes.tolist()

    def joined(local: Tensor) -> Tensor:
        padded = local.new_zeros(max(counts))
        padded[: len(local)] = local
        rows = local.new_empty(world_size * len(padded))
        dist.all_gather_into_tensor(rows, padded, group=group)
        rows = rows.view(world_size, -1)
        return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])

    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    return joined(entropy), joined(candidates.to(torch.uint8)).bool(), own
