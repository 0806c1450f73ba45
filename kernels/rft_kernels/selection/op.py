"""Which prefix tokens are learnt from: the top fraction of the candidates by entropy (E3).

T tokens, B sequences. In torch three stable sorts, O(T log T); on a CUDA device, and over ranks
anywhere, a radix select, O(T).
"""

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check, _dispatch
from .._bundle import bundled_op
from .ranks import Ranks
from .torch_backend import select, select_over_ranks

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
    backend: str = "auto",
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
        backend: see `token_stats`; a float64 entropy is served by torch.
    Returns:
        [...] bool, a subset of `candidate_mask`. Ties go to the earlier position.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    Not differentiable. Deterministic. No host synchronisation. In Triton a
    few launches.
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
    in_triton = _dispatch.resolve_for_tokens(backend, values) == "triton"
    if process_group is not None:
        over_ranks = select_over_ranks
        if in_triton:
            from .triton_backend import select_pool as over_ranks
        kept = over_ranks(values, candidates, fraction, order, seed, Ranks(process_group))
    elif in_triton:
        # As text: a seed may be wider than an op's integer, and a fraction is exact.
        kept = _select_on_device(values, candidates, cu_seqlens, str(fraction), order, str(seed))
    else:
        kept = select(values, candidates, fraction, cu_seqlens, order, seed)
    return kept.view(entropy.shape)


def check_fraction(fraction: Fraction | float | str, num_tokens: int) -> Fraction:
    """The exact fraction meant; refuses one whose product with `num_tokens` would not fit int64."""
    if isinstance(fraction, bool) or not isinstance(fraction, Fraction | int | float | str):
        raise TypeError(f"fraction must be a Fraction or number, got {type(fraction).__name__}")
    try:
        exact = fraction if isinstance(fraction, Fraction) else Fraction(str(fraction))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}") from error
    if not 0 <= exact <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if num_tokens * exact.denominator > _INT64_MAX:
        raise ValueError(f"fraction {exact} has too large a denominator for {num_tokens} tokens")
    return exact


@bundled_op("select_top_entropy")
def _select_on_device(
    entropy: Tensor,  # [T]
    candidates: Tensor,  # [T]
    cu_seqlens: Tensor | None,  # [B + 1]
    fraction: str,
    order: str,
    seed: str,
) -> Tensor:
    from . import triton_backend

    arguments = (entropy, candidates, Fraction(fraction))
    one_pool = cu_seqlens is None or len(cu_seqlens) == 2
    if one_pool and len(entropy) > triton_backend.SMALL_POOL:
        return triton_backend.select_pool(*arguments, order, int(seed))
    return triton_backend.select_sequences(*arguments, cu_seqlens, order, int(seed))


@_select_on_device.register_fake
def _(entropy, candidates, *_):
    return torch.empty_like(candidates, memory_format=torch.contiguous_format)
