"""The loss of a token, its derivatives and the metrics in one pass, summed by a second (E4 to E8).

T tokens, B sequences, N programs, M sums. The mathematics of `torch_backend.py`, in float32.
Token ratios: every input read once, one derivative (two with an entropy bonus) written, 4 bytes a
token each, 1 a mask. Ratios of sequences: a program a sequence, the inputs read three times. Sums
are formed of the programs' partial sums in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy_config import LOG_RATIO_BOUND, SUMS, Terms
from .tokens import Tokens

TILE = 512  # tokens a program looks at together

_NUM_SUMS = tl.constexpr(len(SUMS))
_PADDED = tl.constexpr(triton.next_power_of_2(len(SUMS)))
_BOUND = tl.constexpr(LOG_RATIO_BOUND)
(
    _LOSS, _NUM_TOKENS, _NUM_PREFIX, _NUM_SELECTED, _NUM_DROPPED, _CLIPPED_LOW, _CLIPPED_HIGH,
    _CLIPPED_DUAL, _RATIO_SUM, _RATIO_MAX, _APPROX_KL_SUM, _ENTROPY_SUM, _KL_SUM,
) = map(tl.constexpr, range(len(SUMS)))  # fmt: skip


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _load(ptr, offsets, mask):
    """0 outside the mask, whatever stands there."""
    return tl.load(ptr + offsets, mask=mask, other=0).to(tl.float32)


@triton.jit
def _load_masks(
    mask_ptr, prefix_ptr, rollout_ptr, offsets, stop, HAS_PREFIX: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Tokens asked for; those of them in the loss; those of a prefix."""
    inside = offsets < stop
    asked = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
    prefix = tl.zeros_like(asked)
    if HAS_PREFIX:
        prefix = tl.load(prefix_ptr + offsets, mask=inside, other=0) != 0
    mask = asked
    if HAS_CAP:
        rollout = _load(rollout_ptr, offsets, asked & ~prefix)
        mask = asked & (tl.abs(rollout) < float("inf"))
    return asked, mask, prefix


@triton.jit
def _log_ratio(log_probs, old_ptr, offsets, mask, HAS_OLD: tl.constexpr):
    if HAS_OLD:
        return log_probs - _load(old_ptr, offsets, mask)
    else:
        return tl.zeros_like(log_probs)


@triton.jit
def _policy_term(
    log_ratio, log_probs, advantages_ptr, old_ptr, rollout_ptr, offsets, mask, prefix, low, high,
    prefix_low, prefix_high, dual_clip, cap, HAS_OLD: tl.constexpr, HAS_DUAL: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Loss and its slope by the log-ratio; the ratio, and by which bound it is clipped (E4, E6)."""
    advantages = _load(advantages_ptr, offsets, mask)
    sloped = tl.abs(log_ratio) <= _BOUND
    ratio = tl.exp(_clamp(log_ratio, -_BOUND, _BOUND))
    lowest, highest = tl.where(prefix, prefix_low, low), tl.where(prefix, prefix_high, high)
    policy = -advantages * ratio
    bounded = -advantages * _clamp(ratio, lowest, highest)
    clipped = bounded > policy
    loss = tl.where(clipped, bounded, policy)
    dual = tl.zeros_like(clipped)
    if HAS_DUAL:
        ceiling = -dual_clip * advantages
        dual = (advantages < 0) & (loss > ceiling)
        loss = tl.where(dual, ceiling, loss)
    slope = tl.where(sloped & ~clipped & ~dual, policy, 0.0)
    if HAS_CAP:
        weighted = mask & ~prefix
        before = log_probs
        if HAS_OLD:
            before = _load(old_ptr, offsets, weighted)
        gap = before - _load(rollout_ptr, offsets, weighted)
        weight = tl.exp(tl.where(gap > _BOUND, _BOUND, gap))
        weight = tl.where(prefix, 1.0, tl.where(weight > cap, cap, weight))
        loss, slope = loss * weight, slope * weight
    return loss, slope, ratio, clipped & (ratio < lowest), clipped & (ratio > highest), dual


@triton.jit
def _exp_excess(x, exp_x):
    """e^x - 1 - x, of a small x by its series: the difference would be all rounding."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(7):
        series = 1 + x * series * (1.0 / (9 - i))
    return tl.where(tl.abs(x) < 0.5, x * x / 2 * series, exp_x - 1 - x)


@triton.jit
def _kl_term(d, KL: tl.constexpr):
    """KL to the reference from d = log_prob - ref_log_prob, and its slope (E7)."""
    if KL == "k1":
        return d, tl.full(d.shape, 1.0, tl.float32)
    elif KL == "k2":
        return d * d / 2, d
    else:
        inverse = tl.exp(_clamp(-d, -_BOUND, _BOUND))
        return _exp_excess(-d, inverse), 1 - tl.where(tl.abs(d) <= _BOUND, inverse, 0.0)


@triton.jit
def _placed(sums, place, value):
    """`sums`, with the sum over the tile at its place."""
    return tl.where(tl.arange(0, _PADDED) == place, tl.sum(value.to(tl.float32), 0), sums)


@triton.jit
def take_tokens(
    sums, log_probs, entropy, row_log_ratio, row_slope, advantages_ptr, old_ptr, rollout_ptr,
    ref_ptr, offsets, asked, mask, prefix, low, high, prefix_low, prefix_high, dual_clip, cap,
    entropy_coef, kl_coef, HAS_OLD: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_BONUS: tl.constexpr, HAS_DUAL: tl.constexpr, HAS_CAP: tl.constexpr, KL: tl.constexpr,
    SEQUENCE: tl.constexpr,
):  # fmt: skip
    """`sums` with these tokens in them; their losses' slopes by log-probability and entropy."""
    if SEQUENCE:
        log_ratio = tl.where(mask, row_log_ratio, 0.0)
    else:
        log_ratio = _log_ratio(log_probs, old_ptr, offsets, mask, HAS_OLD)
    loss, slope, ratio, clipped_low, clipped_high, dual = _policy_term(
        log_ratio, log_probs, advantages_ptr, old_ptr, rollout_ptr, offsets, mask, prefix, low,
        high, prefix_low, prefix_high, dual_clip, cap, HAS_OLD, HAS_DUAL, HAS_CAP,
    )  # fmt: skip
    if SEQUENCE:
        slope = tl.where(mask, row_slope, 0.0)
    tile = tl.zeros((_PADDED,), tl.float32)
    dentropy = tl.zeros_like(slope)
    if HAS_ENTROPY:
        tile = _placed(tile, _ENTROPY_SUM, entropy)
        if HAS_BONUS:
            loss -= entropy_coef * entropy
            dentropy = tl.where(mask, -entropy_coef, 0.0)
    if KL != "none":
        d = log_probs - _load(ref_ptr, offsets, mask)
        kl, dkl = _kl_term(d, KL)
        kl, dkl = tl.where(mask, kl, 0.0), tl.where(mask, dkl, 0.0)
        tile = _placed(tile, _KL_SUM, kl)
        loss += kl_coef * kl
        slope += kl_coef * dkl

    tile = _placed(tile, _LOSS, loss)
    tile = _placed(tile, _NUM_TOKENS, mask)
    tile = _placed(tile, _NUM_PREFIX, prefix)
    tile = _placed(tile, _NUM_SELECTED, mask & prefix)
    tile = _placed(tile, _NUM_DROPPED, asked & ~mask)
    tile = _placed(tile, _CLIPPED_LOW, clipped_low)
    tile = _placed(tile, _CLIPPED_HIGH, clipped_high)
    tile = _placed(tile, _CLIPPED_DUAL, dual)
    tile = _placed(tile, _RATIO_SUM, tl.where(mask, ratio, 0.0))
    approx_kl = _exp_excess(_clamp(log_ratio, -_BOUND, _BOUND), ratio)
    tile = _placed(tile, _APPROX_KL_SUM, tl.where(mask, approx_kl, 0.0))
    places = tl.arange(0, _PADDED)
    ratio_sum = tl.sum(tl.where(places == _RATIO_SUM, tile, 0.0), 0)
    largest = tl.max(tl.where(mask, ratio, 0.0), 0)
    largest = tl.where(ratio_sum == ratio_sum, largest, ratio_sum)  # a NaN is not lost
    largest = tl.maximum(sums, largest, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(places == _RATIO_MAX, largest, sums + tile), slope, dentropy


@triton.jit
def store_sums(partial_ptr, sums, program):
    """A program's sums, in its column of [M, N]."""
    places = tl.arange(0, _PADDED)
    row = partial_ptr + places.to(tl.int64) * tl.num_programs(0) + program
    tl.store(row, sums, mask=places < _NUM_SUMS)


@triton.jit
def _objective_kernel(
    log_probs_ptr,  # [T]
    old_ptr,  # [T]
    advantages_ptr,  # [T]
    mask_ptr,  # [T] uint8
    prefix_ptr,  # [T] uint8
    rollout_ptr,  # [T]
    ref_ptr,  # [T]
    entropy_ptr,  # [T]
    cu_seqlens_ptr,  # [B + 1]
    dlog_probs_ptr,  # [T], out
    dentropy_ptr,  # [T], out
    partial_ptr,  # [M, N], out
    low,
    high,
    prefix_low,
    prefix_high,
    dual_clip,
    cap,
    entropy_coef,
    kl_coef,
    num_tokens,
    HAS_OLD: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_CAP: tl.constexpr,
    KL: tl.constexpr,
    SEQUENCE: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if SEQUENCE:
        start = tl.load(cu_seqlens_ptr + program).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + program + 1).to(tl.int64)
    else:
        start = program * TILE
        stop = tl.minimum(start + TILE, num_tokens)

    row_log_ratio, row_slope = 0.0, 0.0
    if SEQUENCE:
        total, count = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        for first in range(start, stop, TILE):
            offsets = first + tl.arange(0, TILE)
            _, mask, _ = _load_masks(
                mask_ptr, prefix_ptr, rollout_ptr, offsets, stop, HAS_PREFIX, HAS_CAP
            )
            log_probs = _load(log_probs_ptr, offsets, mask)
            total += tl.sum(_log_ratio(log_probs, old_ptr, offsets, mask, HAS_OLD), 0)
            count += tl.sum(mask.to(tl.float32), 0)
        count = tl.maximum(count, 1.0)
        row_log_ratio = total / count
        total = tl.full((), 0.0, tl.float32)
        for first in range(start, stop, TILE):
            offsets = first + tl.arange(0, TILE)
            _, mask, prefix = _load_masks(
                mask_ptr, prefix_ptr, rollout_ptr, offsets, stop, HAS_PREFIX, HAS_CAP
            )
            _, slope, _, _, _, _ = _policy_term(
                tl.where(mask, row_log_ratio, 0.0), _load(log_probs_ptr, offsets, mask),
                advantages_ptr, old_ptr, rollout_ptr, offsets, mask, prefix, low, high, prefix_low,
                prefix_high, dual_clip, cap, HAS_OLD, HAS_DUAL, HAS_CAP,
            )  # fmt: skip
            total += tl.sum(slope, 0)
        row_slope = total / count

    sums = tl.zeros((_PADDED,), tl.float32)
    for first in range(start, stop, TILE):
        offsets = first + tl.arange(0, TILE)
        asked, mask, prefix = _load_masks(
            mask_ptr, prefix_ptr, rollout_ptr, offsets, stop, HAS_PREFIX, HAS_CAP
        )
        log_probs = _load(log_probs_ptr, offsets, mask)
        entropy = log_probs
        if HAS_ENTROPY:
            entropy = _load(entropy_ptr, offsets, mask)
        sums, slope, dentropy = take_tokens(
            sums, log_probs, entropy, row_log_ratio, row_slope, advantages_ptr, old_ptr,
            rollout_ptr, ref_ptr, offsets, asked, mask, prefix, low, high, prefix_low, prefix_high,
            dual_clip, cap, entropy_coef, kl_coef, HAS_OLD, HAS_ENTROPY, HAS_BONUS, HAS_DUAL,
            HAS_CAP, KL, SEQUENCE,
        )  # fmt: skip
        tl.store(dlog_probs_ptr + offsets, slope, mask=offsets < stop)
        if HAS_BONUS:
            tl.store(dentropy_ptr + offsets, dentropy, mask=offsets < stop)
    store_sums(partial_ptr, sums, program)


@triton.jit
def _sum_kernel(
    partial_ptr,  # [M, N]
    sums_ptr,  # [M], out
    num_programs,
    TILE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float64)
    largest = tl.zeros((TILE,), tl.float32)
    for first in range(0, num_programs, TILE):
        index = first + tl.arange(0, TILE)
        row = partial_ptr + place * num_programs + index
        values = tl.load(row, mask=index < num_programs, other=0.0)
        total += values.to(tl.float64)
        largest = tl.maximum(largest, values)
    result = tl.sum(total, 0).to(tl.float32)
    if place == _RATIO_MAX:
        result = tl.where(result == result, tl.max(largest, 0), result)
    tl.store(sums_ptr + place, result)


def pointer(x: Tensor | None) -> Tensor | None:
    """As a kernel takes it: of unit stride, a mask as bytes."""
    if x is None:
        return None
    return x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()


def objective_fwd(
    log_probs: Tensor,  # [T], float32 or narrower
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    terms: Terms,
    cu_seqlens: Tensor | None,  # [B + 1]; given: one ratio a sequence
) -> tuple[Tensor, Tensor, Tensor]:
    """SUMS [M], and the derivatives of their first by `log_probs` and (if any) by `entropy`."""
    num_tokens = len(log_probs)
    by_sequence = cu_seqlens is not None and num_tokens > 0
    num_programs = len(cu_seqlens) - 1 if by_sequence else max(triton.cdiv(num_tokens, TILE), 1)
    partial = log_probs.new_empty(len(SUMS), num_programs, dtype=torch.float32)
    sums = partial.new_empty(len(SUMS))
    dlog_probs = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    dentropy = dlog_probs.new_empty(num_tokens if terms.entropy_coef else 0)
    low, high, prefix_low, prefix_high = terms.clip_range

    with torch.cuda.device_of(log_probs):
        _objective_kernel[(num_programs,)](
            log_probs_ptr=pointer(log_probs),
            old_ptr=pointer(tokens.old_log_probs),
            advantages_ptr=pointer(tokens.advantages),
            mask_ptr=pointer(tokens.loss_mask),
            prefix_ptr=pointer(tokens.prefix_mask),
            rollout_ptr=pointer(tokens.rollout_log_probs),
            ref_ptr=pointer(tokens.ref_log_probs),
            entropy_ptr=pointer(entropy),
            cu_seqlens_ptr=pointer(cu_seqlens),
            dlog_probs_ptr=dlog_probs,
            dentropy_ptr=dentropy,
            partial_ptr=partial,
            low=low,
            high=high,
            prefix_low=prefix_low,
            prefix_high=prefix_high,
            dual_clip=0.0 if terms.dual_clip is None else terms.dual_clip,
            cap=0.0 if terms.importance_cap is None else terms.importance_cap,
            entropy_coef=terms.entropy_coef,
            kl_coef=terms.kl_coef,
            num_tokens=num_tokens,
            HAS_OLD=tokens.old_log_probs is not None,
            HAS_PREFIX=tokens.prefix_mask is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_BONUS=entropy is not None and terms.entropy_coef != 0,
            HAS_DUAL=terms.dual_clip is not None,
            HAS_CAP=terms.importance_cap is not None,
            KL=terms.kl,
            SEQUENCE=by_sequence,
            TILE=TILE,
            num_warps=4,
        )
        _sum_kernel[(len(SUMS),)](
            partial_ptr=partial, sums_ptr=sums, num_programs=num_programs, TILE=TILE, num_warps=4
        )
    return sums, dlog_probs, dentropy
