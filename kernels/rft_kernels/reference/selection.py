"""Specification of `select_top_entropy` (E3), for one process; order "random" is not specified."""

import math
from fractions import Fraction

import torch
from torch import Tensor

_FIFTH = Fraction(1, 5)


def select_top_entropy(
    entropy: Tensor,
    candidate_mask: Tensor,
    *,
    fraction: Fraction | float | str = _FIFTH,
    cu_seqlens: Tensor | None = None,
    order: str = "high",
    seed: int | None = None,
    process_group: None = None,
) -> Tensor:
    """Sorts each pool's candidates by (entropy, position) and keeps the first k."""
    if order == "random" or process_group is not None:
        raise NotImplementedError("the specification covers orders high and low on one process")
    values, candidates = entropy.flatten().tolist(), candidate_mask.flatten().tolist()
    bounds = [0, len(values)] if cu_seqlens is None else cu_seqlens.tolist()
    dropped = 1 - Fraction(str(fraction))

    def rank(i: int) -> tuple[bool, float, int]:
        nan = math.isnan(values[i])
        return nan, 0 if nan else values[i] * (-1 if order == "high" else 1), i

    kept = [False] * len(values)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        pool = sorted((i for i in range(start, stop) if candidates[i]), key=rank)
        for i in pool[: len(pool) - math.floor(len(pool) * dropped)]:
            kept[i] = True
    return torch.tensor(kept, dtype=torch.bool, device=entropy.device).view(entropy.shape)
