"""Triton: the two vocabulary-sized primitives, one program a row (E1, E2).

T rows, V classes. `row_stats` reads each valid row once: T V elements. `row_grad` reads the rows
whose scalars are not all zero and writes every row once: a T V read, T V written, a their share. No
temporaries, no atomics; a row's result depends on that row alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..results import stats_dtype
from .launch import row_launch
from .online import (
    LOG2_E,
    divide,
    exponent,
    join_lanes,
    join_squares,
    soft_cap,
    start_lanes,
    take_squares,
    take_tile,
)
from .scalars import RowStats, Slopes

NUM_SAVED = 2  # a row's maximum, and its sum of e^(z - max)


@triton.jit
def _tile(start, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """Columns [DEPTH, LANES] from `start` on."""
    return start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _load(ptr, col, stride, num_classes, WHOLE: tl.constexpr):
    """Logits of a row at columns `col`, read for the last time; -inf beyond its end."""
    ptr += col.to(tl.int64) * stride
    if WHOLE:
        x = tl.load(ptr, eviction_policy="evict_first")
    else:
        x = tl.load(ptr, col < num_classes, -float("inf"), eviction_policy="evict_first")
    return x


@triton.jit
def _store(ptr, col, stride, num_classes, x, WHOLE: tl.constexpr):
    ptr += col.to(tl.int64) * stride
    x = x.to(ptr.dtype.element_ty)
    if WHOLE:
        tl.store(ptr, x)
    else:
        tl.store(ptr, x, col < num_classes)


@triton.jit
def _grad(
    x,
    col,
    target,
    g,
    base,
    slope,
    maximum,
    scale,
    SOFTCAP: tl.constexpr,
    square=0.0,
    HAS_SQUARED: tl.constexpr = False,
):
    """g at the target, minus e (base + slope (z - max) scale - square e), e = e^(z - max)."""
    if SOFTCAP is not None:
        x, cap_slope = soft_cap(x, SOFTCAP)
    power = exponent(x, maximum, scale)
    e = tl.exp2(power)
    factor = base + slope * power
    if HAS_SQUARED:
        factor -= square * e
    dx = tl.where(col == target, g, 0.0) - e * factor
    if SOFTCAP is not None:
        dx *= cap_slope
    return dx


@triton.jit
def _take(
    m,
    s,
    w,
    q,
    x,
    col,
    num_classes,
    scale,
    WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """`take_tile` of logits as they were loaded, and if wanted `take_squares`."""
    x = x.to(m.dtype)
    if SOFTCAP is not None:
        x, _ = soft_cap(x, SOFTCAP)
        if not WHOLE:
            x = tl.where(col < num_classes, x, -float("inf"))
    new_m, s, w = take_tile(m, s, w, x, scale)
    if SQUARES:
        q = take_squares(q, m, new_m, x, scale)
    return new_m, s, w, q


@triton.jit
def _row_stats_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T]
    valid_ptr,  # [T]
    temperature_ptr,  # [T]
    saved_ptr,  # [T, NUM_SAVED]
    log_probs_ptr,  # [T]
    entropy_ptr,  # [T]
    lse_ptr,  # [T]
    squares_ptr,  # [T]
    temperature,
    logits_row_stride,
    logits_col_stride,
    num_classes,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    whole = num_classes // (DEPTH * LANES) * (DEPTH * LANES)  # columns that need no mask
    dtype: tl.constexpr = log_probs_ptr.dtype.element_ty
    if tl.load(valid_ptr + row):
        logits_ptr += row * logits_row_stride
        t = temperature
        if HAS_ROW_TEMPERATURE:
            t = tl.load(temperature_ptr + row).to(dtype)
        scale = divide(LOG2_E, t, dtype)
        m, s, w = start_lanes(LANES, dtype)
        q = s
        for start in tl.range(0, whole, DEPTH * LANES, num_stages=NUM_STAGES):
            col = _tile(start, DEPTH, LANES)
            x = _load(logits_ptr, col, logits_col_stride, num_classes, True)
            m, s, w, q = _take(m, s, w, q, x, col, num_classes, scale, True, SOFTCAP, HAS_SQUARES)
        if whole < num_classes:
            col = _tile(whole, DEPTH, LANES)
            x = _load(logits_ptr, col, logits_col_stride, num_classes, False)
            m, s, w, q = _take(m, s, w, q, x, col, num_classes, scale, False, SOFTCAP, HAS_SQUARES)
        maximum, total, weighted = join_lanes(m, s, w, scale)
        log_total = tl.log(total)

        target = tl.load(targets_ptr + row).to(tl.int64)
        known = (target >= 0) & (target < num_classes)
        at_target = logits_ptr + target * logits_col_stride
        x = tl.load(at_target, mask=known, other=float("nan")).to(dtype)
        if SOFTCAP is not None:
            x, _ = soft_cap(x, SOFTCAP)
        tl.store(log_probs_ptr + row, divide(x - maximum, t, dtype) - log_total)
        entropy = log_total - weighted / total / LOG2_E
        # Neither term is negative, as far as the device's logarithm of 1 and a bit is not.
        entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(entropy_ptr + row, entropy)
        tl.store(lse_ptr + row, divide(maximum, t, dtype) + log_total)
        if HAS_SQUARES:
            squares = divide(join_squares(q, m, maximum, scale), total * total, dtype)
            tl.store(squares_ptr + row, squares)
        tl.store(saved_ptr + row * 2, maximum)
        tl.store(saved_ptr + row * 2 + 1, total)
    else:
        tl.store(log_probs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if HAS_SQUARES:
            tl.store(squares_ptr + row, 0.0)
        tl.store(saved_ptr + row * 2, 0.0)
        tl.store(saved_ptr + row * 2 + 1, 0.0)


@triton.jit
def _row_grad_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T]
    temperature_ptr,  # [T]
    entropy_ptr,  # [T]
    saved_ptr,  # [T, NUM_SAVED]
    dlog_probs_ptr,  # [T]
    dentropy_ptr,  # [T]
    dlse_ptr,  # [T]
    squared_ptr,  # [T]
    dlogits_ptr,  # [T, V], may be logits_ptr
    temperature,
    logits_row_stride,
    logits_col_stride,
    dlogits_row_stride,
    dlogits_col_stride,
    num_classes,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_DLOG_PROBS: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_SQUARED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    whole = num_classes // (DEPTH * LANES) * (DEPTH * LANES)  # columns that need no mask
    dtype: tl.constexpr = entropy_ptr.dtype.element_ty
    logits_ptr += row * logits_row_stride
    dlogits_ptr += row * dlogits_row_stride
    g = tl.zeros([], dtype)
    h = tl.zeros([], dtype)
    of_lse = tl.zeros([], dtype)
    square = tl.zeros([], dtype)
    if HAS_DLOG_PROBS:
        g = tl.load(dlog_probs_ptr + row).to(dtype)
    if HAS_DENTROPY:
        h = tl.load(dentropy_ptr + row).to(dtype)
    if HAS_DLSE:
        of_lse = tl.load(dlse_ptr + row).to(dtype)
    if HAS_SQUARED:
        square = tl.load(squared_ptr + row).to(dtype)
    if (g != 0) | (h != 0) | (of_lse != 0) | (square != 0):
        t = temperature
        if HAS_ROW_TEMPERATURE:
            t = tl.load(temperature_ptr + row).to(dtype)
        scale = divide(LOG2_E, t, dtype)
        target = tl.load(targets_ptr + row).to(tl.int32)
        maximum = tl.load(saved_ptr + row * 2)
        total = tl.load(saved_ptr + row * 2 + 1)
        g /= t
        slope = h / t / LOG2_E / total
        of_p = g - of_lse / t if HAS_DLSE else g
        base = (of_p + h / t * (tl.load(entropy_ptr + row) - tl.log(total))) / total
        square = square / t / total / total
        for start in tl.range(0, whole, DEPTH * LANES, num_stages=NUM_STAGES):
            col = _tile(start, DEPTH, LANES)
            x = _load(logits_ptr, col, logits_col_stride, num_classes, True).to(dtype)
            dx = _grad(x, col, target, g, base, slope, maximum, scale, SOFTCAP, square, HAS_SQUARED)
            _store(dlogits_ptr, col, dlogits_col_stride, num_classes, dx, True)
        if whole < num_classes:
            col = _tile(whole, DEPTH, LANES)
            x = _load(logits_ptr, col, logits_col_stride, num_classes, False).to(dtype)
            dx = _grad(x, col, target, g, base, slope, maximum, scale, SOFTCAP, square, HAS_SQUARED)
            _store(dlogits_ptr, col, dlogits_col_stride, num_classes, dx, False)
    else:
        zeros = tl.zeros([DEPTH, LANES], dlogits_ptr.dtype.element_ty)
        for start in range(0, whole, DEPTH * LANES):
            col = _tile(start, DEPTH, LANES)
            _store(dlogits_ptr, col, dlogits_col_stride, num_classes, zeros, True)
        col = _tile(whole, DEPTH, LANES)
        _store(dlogits_ptr, col, dlogits_col_stride, num_classes, zeros, False)


def row_stats(
    logits: Tensor,  # [T, V], any strides
    targets: Tensor,  # [T]
    valid: Tensor,  # [T] bool
    temperature: float | Tensor,  # or [T]
    softcap: float | None,
    scratch_bytes: int,
    squares: bool = False,
) -> RowStats:
    """The statistics of each valid row, 0 elsewhere; saved is what E2 wants."""
    num_rows, num_classes = logits.shape
    log_probs = logits.new_empty(num_rows, dtype=stats_dtype(logits.dtype))
    entropy, lse = torch.empty_like(log_probs), torch.empty_like(log_probs)
    saved = log_probs.new_empty(num_rows, NUM_SAVED)
    found = RowStats(
        log_probs, entropy, lse, saved, torch.empty_like(log_probs) if squares else None
    )
    if num_rows == 0:
        return found
    number, per_row = _temperature(temperature, log_probs)
    launch = row_launch(logits)
    with torch.cuda.device_of(logits):
        _row_stats_kernel[(num_rows,)](
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            valid_ptr=valid.contiguous(),
            temperature_ptr=per_row,
            saved_ptr=saved,
            log_probs_ptr=log_probs,
            entropy_ptr=entropy,
            lse_ptr=lse,
            squares_ptr=found.squares,
            temperature=number,
            logits_row_stride=logits.stride(0),
            logits_col_stride=logits.stride(1),
            num_classes=num_classes,
            HAS_ROW_TEMPERATURE=per_row is not None,
            HAS_SQUARES=squares,
            SOFTCAP=softcap,
            DEPTH=launch.depth,
            LANES=launch.lanes,
            NUM_STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
    return found


def row_grad(
    out: Tensor,  # [T, V], written; may be logits
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T]
    temperature: float | Tensor,  # or [T]
    softcap: float | None,
    entropy: Tensor,  # [T]
    saved: Tensor,  # [T, NUM_SAVED]
    slopes: Slopes,
    scratch_bytes: int,
) -> None:
    """dz_j = g (1[j = y] - p_j) - h p_j (log p_j + H) + l p_j + q p_j^2, and on to the logits."""
    num_rows, num_classes = logits.shape
    if num_rows == 0:
        return
    number, per_row = _temperature(temperature, entropy)
    launch = row_launch(logits)
    scalars = Slopes(*(None if x is None else x.contiguous() for x in slopes))
    with torch.cuda.device_of(logits):
        _row_grad_kernel[(num_rows,)](
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            temperature_ptr=per_row,
            entropy_ptr=entropy.contiguous(),
            saved_ptr=saved.contiguous(),
            dlog_probs_ptr=scalars.dlog_probs,
            dentropy_ptr=scalars.dentropy,
            dlse_ptr=scalars.dlse,
            squared_ptr=scalars.squared,
            dlogits_ptr=out,
            temperature=number,
            logits_row_stride=logits.stride(0),
            logits_col_stride=logits.stride(1),
            dlogits_row_stride=out.stride(0),
            dlogits_col_stride=out.stride(1),
            num_classes=num_classes,
            HAS_ROW_TEMPERATURE=per_row is not None,
            HAS_DLOG_PROBS=scalars.dlog_probs is not None,
            HAS_DENTROPY=scalars.dentropy is not None,
            HAS_DLSE=scalars.dlse is not None,
            HAS_SQUARED=scalars.squared is not None,
            SOFTCAP=softcap,
            DEPTH=launch.depth,
            LANES=launch.lanes,
            NUM_STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )


def _temperature(temperature: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A number, or one a row; a kernel takes numbers in float32 only, so float64 is one a row."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.contiguous()
    if like.dtype == torch.float64:
        return 1.0, torch.full_like(like, temperature)
    return temperature, None
