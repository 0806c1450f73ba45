"""Device functions of a row read once: running maximum, sum and weighted sum; softcap (E1, E11).

Every lane keeps three numbers of its own and takes DEPTH logits of a tile at a time, so the loop
has 1 + 1 / DEPTH exponentials a logit and nothing that crosses threads. Exponents are differences
times scale = log2(e) / temperature: a large common part of the logits cancels before it can round.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# 2 to this power is 0, in float64 too, and a product with it is 0 and not NaN as with -inf.
_LEAST_EXPONENT = tl.constexpr(-1e4)
_NO_MAXIMUM = tl.constexpr(-3e38)  # below all logits, and unlike -inf it can be subtracted from one


@triton.jit
def divide(x, y, dtype: tl.constexpr):
    """x / y, rounded once: in float32 `/` is allowed two units in the last place."""
    if dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def exponent(x, maximum, scale):
    """(x - maximum) scale, finite for x = -inf; NaN stays NaN."""
    return tl.maximum((x - maximum) * scale, _LEAST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def start_lanes(LANES: tl.constexpr, dtype: tl.constexpr):
    """maximum m, s = sum e^(x - m) and w = sum e^(x - m) (x - m) scale of nothing, [LANES] each."""
    zeros = tl.zeros([LANES], dtype)
    return zeros + _NO_MAXIMUM, zeros, zeros


@triton.jit
def take_tile(m, s, w, x, scale):
    """Adds x [DEPTH, LANES] to what the lanes hold."""
    new_m = tl.maximum(m, tl.max(x, 0))
    shift = exponent(m, new_m, scale)
    keep = tl.exp2(shift)
    power = exponent(x, new_m[None, :], scale)
    p = tl.exp2(power)
    w = keep * (w + s * shift) + tl.sum(p * power, 0)
    return new_m, keep * s + tl.sum(p, 0), w


@triton.jit
def join_lanes(m, s, w, scale):
    """m, s and w of all lanes together."""
    maximum = tl.max(m, 0)
    shift = exponent(m, maximum, scale)
    keep = tl.exp2(shift)
    return maximum, tl.sum(keep * s, 0), tl.sum(keep * (w + s * shift), 0)


@triton.jit
def take_squares(q, m, new_m, x, scale):
    """q = sum e^(2 (x - m)), [LANES], after `take_tile` of x, which took m to `new_m`."""
    keep = tl.exp2(exponent(m, new_m, scale))
    p = tl.exp2(exponent(x, new_m[None, :], scale))  # as in `take_tile`, which computes it once
    return keep * keep * q + tl.sum(p * p, 0)


@triton.jit
def join_squares(q, m, maximum, scale):
    """q of all lanes together."""
    keep = tl.exp2(exponent(m, maximum, scale))
    return tl.sum(keep * keep * q, 0)


@triton.jit
def soft_cap(x, CAP: tl.constexpr):
    """CAP tanh(x / CAP) and its slope by x."""
    # tanh of more than 20 is 1, in float64 too.
    u = tl.minimum(tl.abs(x) * (1 / CAP), 20.0, propagate_nan=tl.PropagateNan.ALL)
    # Below 1/2, where the exponential would cancel, Lambert's continued fraction, within 2e-13.
    v, e, small = u * u, tl.exp2(u * (2 * LOG2_E)), u < 0.5
    above = tl.where(small, u * (10395 + v * (1260 + v * 21)), e - 1)
    below = tl.where(small, 10395 + v * (4725 + v * (210 + v)), e + 1)
    tanh = above / below
    return tl.where(x < 0, -CAP, CAP) * tanh, 1 - tanh * tanh
