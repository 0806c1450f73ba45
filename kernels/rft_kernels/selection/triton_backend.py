"""Selection by entropy on the device: a radix select over ordered bits, eight at a time (E3).

T tokens, B sequences, N programs (at most MAX_PROGRAMS). A pool takes a memset and 5 launches (6
for a random order), each reading entropy and mask once: 5 (4 + 1) T + T bytes for float32, all but
the first read out of L2 up to some million tokens. Sequences, and a small pool, take one launch.
Counts are integers, so the atomic additions give the same bits in any order.
"""

from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ranks import Ranks

TILE = 2048  # tokens a program looks at together
MAX_PROGRAMS = 512  # per pool; a power of 2
SMALL_POOL = 8192  # tokens up to which one program is enough

_BINS = tl.constexpr(256)
_NUM_DIGITS = tl.constexpr(4)


@triton.jit
def _mixed(index, seed_low, seed_high):
    """The finalizer of MurmurHash3 on (index, seed): 32 well-mixed bits."""
    bits = index.to(tl.uint32)
    for i in tl.static_range(2):
        bits = bits ^ (seed_low if i == 0 else seed_high).to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        bits = bits ^ (bits >> 16)
    return bits


@triton.jit
def _load_keys(
    entropy_ptr, mask_ptr, offsets, stop, num_before, seed_low, seed_high, ORDER: tl.constexpr
):
    """Unsigned keys, the smallest kept first; which tokens are candidates; candidates up to here.

    `num_before`: candidates of the pool before the tile, which a random order draws from.
    """
    inside = offsets < stop
    candidates = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
    if ORDER == "random":
        running = tl.cumsum(candidates.to(tl.int32), 0)
        keys = _mixed(num_before + running - 1, seed_low, seed_high)
        num_before += tl.sum(candidates.to(tl.int32), 0)
    else:
        x = tl.load(entropy_ptr + offsets, mask=inside, other=0).to(tl.float32)
        bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)  # -0 is 0
        keys = bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)
        if ORDER == "high":
            keys = keys ^ 0xFFFFFFFF
        keys = tl.where(x != x, 0xFFFFFFFF, keys)
    return keys, candidates, num_before


@triton.jit
def _digit_counts(keys, candidates, threshold, DIGIT: tl.constexpr):
    """[256] int32: candidates by this digit, of those whose digits before it are `threshold`."""
    if DIGIT > 0:
        candidates = candidates & ((keys >> (32 - 8 * DIGIT)) == threshold)
    digits = ((keys >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    return tl.histogram(digits, _BINS, mask=candidates)


@triton.jit
def _num_kept(counts, dropped, whole):
    num_candidates = tl.sum(counts, 0).to(tl.int64)
    return num_candidates - num_candidates * dropped // whole


@triton.jit
def _append_digit(counts, threshold, left):
    """The threshold one digit longer; how many are left to keep among keys that begin with it."""
    below = tl.cumsum(counts, 0) < left
    digit = tl.sum(below.to(tl.int32), 0)
    left -= tl.sum(tl.where(below, counts, 0), 0)
    return (threshold << 8) | digit.to(tl.uint32), left


@triton.jit
def _threshold(counts_ptr, dropped, whole, NUM_DIGITS: tl.constexpr):
    """The first digits of the last key kept, from the counts of the launches before."""
    threshold = tl.full((), 0, tl.uint32)
    left = tl.full((), 0, tl.int64)
    for digit in tl.static_range(NUM_DIGITS):
        counts = tl.load(counts_ptr + digit * _BINS + tl.arange(0, _BINS))
        if digit == 0:
            left = _num_kept(counts, dropped, whole)
        threshold, left = _append_digit(counts, threshold, left)
    return threshold, left


@triton.jit
def _store_kept(kept_ptr, offsets, stop, keys, candidates, threshold, left, num_ties):
    """Keeps what is under the threshold, and the first `left` of the ties; ties up to here."""
    ties = candidates & (keys == threshold)
    place = num_ties + tl.cumsum(ties.to(tl.int32), 0)
    kept = (candidates & (keys < threshold)) | (ties & (place <= left))
    tl.store(kept_ptr + offsets, kept.to(tl.uint8), mask=offsets < stop)
    return num_ties + tl.sum(ties.to(tl.int32), 0)


@triton.jit
def _sum_before(values_ptr, stride, program, MAX_PROGRAMS: tl.constexpr):
    """Sum of the values of the programs before this one."""
    index = tl.arange(0, MAX_PROGRAMS).to(tl.int64)
    return tl.sum(tl.load(values_ptr + index * stride, mask=index < program, other=0), 0)


@triton.jit
def _num_before(
    candidates_ptr,
    earlier_ptr,
    program,
    ORDER: tl.constexpr,
    HAS_EARLIER: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Candidates of the pool before this program's tokens, where the order draws from them."""
    num_before = tl.full((), 0, tl.int64)
    if ORDER == "random":
        num_before += _sum_before(candidates_ptr, 1, program, MAX_PROGRAMS)
        if HAS_EARLIER:
            num_before += tl.load(earlier_ptr)
    return num_before


@triton.jit
def _count_kernel(
    mask_ptr,  # [T] uint8
    candidates_ptr,  # [N] int32, out
    total_ptr,  # [1] int64, out, starts at 0
    num_tokens,
    tiles_per_program,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * tiles_per_program * TILE
    count = tl.full((), 0, tl.int32)
    for tile in range(tiles_per_program):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        candidates = tl.load(mask_ptr + offsets, mask=offsets < num_tokens, other=0) != 0
        count += tl.sum(candidates.to(tl.int32), 0)
    tl.store(candidates_ptr + program, count)
    tl.atomic_add(total_ptr, count.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["dropped", "whole", "seed_low", "seed_high"])
def _histogram_kernel(
    entropy_ptr,  # [T]
    mask_ptr,  # [T] uint8
    candidates_ptr,  # [N] int32, candidates of each program; for a random order
    earlier_ptr,  # [1] int64, candidates of the ranks before
    counts_ptr,  # [4, 256] int64; row DIGIT is added to, those before it are complete
    ties_ptr,  # [N, 256] int32, out: what this program added of the last digit
    dropped,
    whole,
    seed_low,
    seed_high,
    num_tokens,
    tiles_per_program,
    ORDER: tl.constexpr,
    HAS_EARLIER: tl.constexpr,
    DIGIT: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * tiles_per_program * TILE
    threshold, _ = _threshold(counts_ptr, dropped, whole, DIGIT)
    num_before = _num_before(candidates_ptr, earlier_ptr, program, ORDER, HAS_EARLIER, MAX_PROGRAMS)
    counts = tl.zeros((_BINS,), tl.int32)
    for tile in range(tiles_per_program):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        keys, candidates, num_before = _load_keys(
            entropy_ptr, mask_ptr, offsets, num_tokens, num_before, seed_low, seed_high, ORDER
        )
        counts += _digit_counts(keys, candidates, threshold, DIGIT)
    bins = tl.arange(0, _BINS)
    row = counts_ptr + DIGIT * _BINS + bins
    tl.atomic_add(row, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if DIGIT == _NUM_DIGITS - 1:
        tl.store(ties_ptr + program * _BINS + bins, counts)


@triton.jit(do_not_specialize=["dropped", "whole", "seed_low", "seed_high"])
def _keep_kernel(
    entropy_ptr,  # [T]
    mask_ptr,  # [T] uint8
    candidates_ptr,  # [N] int32
    earlier_ptr,  # [1] int64
    counts_ptr,  # [4, 256] int64
    ties_ptr,  # [N, 256] int32
    earlier_ties_ptr,  # [256] int64, by last digit, of the ranks before
    kept_ptr,  # [T] uint8, out
    dropped,
    whole,
    seed_low,
    seed_high,
    num_tokens,
    tiles_per_program,
    ORDER: tl.constexpr,
    HAS_EARLIER: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * tiles_per_program * TILE
    threshold, left = _threshold(counts_ptr, dropped, whole, _NUM_DIGITS)
    digit = (threshold & 255).to(tl.int64)
    num_ties = tl.full((), 0, tl.int64)
    num_ties += _sum_before(ties_ptr + digit, _BINS, program, MAX_PROGRAMS)
    if HAS_EARLIER:
        num_ties += tl.load(earlier_ties_ptr + digit)
    num_before = _num_before(candidates_ptr, earlier_ptr, program, ORDER, HAS_EARLIER, MAX_PROGRAMS)
    for tile in range(tiles_per_program):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        keys, candidates, num_before = _load_keys(
            entropy_ptr, mask_ptr, offsets, num_tokens, num_before, seed_low, seed_high, ORDER
        )
        num_ties = _store_kept(
            kept_ptr, offsets, num_tokens, keys, candidates, threshold, left, num_ties
        )


@triton.jit(do_not_specialize=["dropped", "whole", "seed_low", "seed_high"])
def _sequences_kernel(
    entropy_ptr,  # [T]
    mask_ptr,  # [T] uint8
    cu_seqlens_ptr,  # [B + 1]; without it all tokens are one sequence
    kept_ptr,  # [T] uint8, out
    dropped,
    whole,
    seed_low,
    seed_high,
    num_tokens,
    ORDER: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    start, stop = sequence, sequence + num_tokens
    if HAS_BOUNDS:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    threshold = tl.full((), 0, tl.uint32)
    left = tl.full((), 0, tl.int64)
    for digit in tl.static_range(_NUM_DIGITS):
        counts = tl.zeros((_BINS,), tl.int32)
        num_before = tl.full((), 0, tl.int64)
        for first in range(start, stop, TILE):
            keys, candidates, num_before = _load_keys(
                entropy_ptr, mask_ptr, first + tl.arange(0, TILE), stop, num_before,
                seed_low, seed_high, ORDER,
            )  # fmt: skip
            counts += _digit_counts(keys, candidates, threshold, digit)
        if digit == 0:
            left = _num_kept(counts, dropped, whole)
        threshold, left = _append_digit(counts, threshold, left)
    num_before = tl.full((), 0, tl.int64)
    num_ties = tl.full((), 0, tl.int64)
    for first in range(start, stop, TILE):
        offsets = first + tl.arange(0, TILE)
        keys, candidates, num_before = _load_keys(
            entropy_ptr, mask_ptr, offsets, stop, num_before, seed_low, seed_high, ORDER
        )
        num_ties = _store_kept(kept_ptr, offsets, stop, keys, candidates, threshold, left, num_ties)


def _scalars(fraction: Fraction, order: str, seed: int) -> dict[str, int | str]:
    """Arguments by value: the share dropped, and the seed as two signed words."""
    dropped = 1 - fraction
    low, high = ((seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
    return {
        "dropped": dropped.numerator,
        "whole": dropped.denominator,
        "seed_low": low - (low >> 31 << 32),
        "seed_high": high - (high >> 31 << 32),
        "ORDER": order,
    }


def select_sequences(
    entropy: Tensor,  # [T], float32 or narrower
    candidates: Tensor,  # [T]
    fraction: Fraction,
    cu_seqlens: Tensor | None,  # [B + 1]; None: one sequence
    order: str,
    seed: int,
) -> Tensor:
    """Mask [T] of what is kept of each sequence; one program a sequence."""
    kept = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    num_sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    if num_sequences and len(entropy):
        with torch.cuda.device_of(entropy):
            _sequences_kernel[(num_sequences,)](
                entropy_ptr=entropy.contiguous(),
                mask_ptr=candidates.contiguous().view(torch.uint8),
                cu_seqlens_ptr=None if cu_seqlens is None else cu_seqlens.contiguous(),
                kept_ptr=kept.view(torch.uint8),
                num_tokens=len(entropy),
                HAS_BOUNDS=cu_seqlens is not None,
                TILE=TILE,
                num_warps=8,
                **_scalars(fraction, order, seed),
            )
    return kept


def select_pool(
    entropy: Tensor,  # [T], float32 or narrower
    candidates: Tensor,  # [T]
    fraction: Fraction,
    order: str,
    seed: int,
    ranks: Ranks | None = None,
) -> Tensor:
    """Mask [T] of what is kept of one pool, over `ranks` if given; the whole device takes part."""
    num_tiles = max(triton.cdiv(len(entropy), TILE), 1)
    tiles_per_program = triton.cdiv(num_tiles, MAX_PROGRAMS)
    grid = (triton.cdiv(num_tiles, tiles_per_program),)
    counts = torch.zeros(_NUM_DIGITS.value, _BINS.value, dtype=torch.int64, device=entropy.device)
    ties = counts.new_empty(grid[0], _BINS.value, dtype=torch.int32)
    mask = candidates.contiguous().view(torch.uint8)
    work = {"num_tokens": len(entropy), "tiles_per_program": tiles_per_program, "TILE": TILE}
    num_candidates = earlier = earlier_ties = None
    if order == "random":
        num_candidates, earlier = counts.new_empty(grid[0], dtype=torch.int32), counts.new_zeros(1)
        with torch.cuda.device_of(entropy):
            _count_kernel[grid](
                mask_ptr=mask, candidates_ptr=num_candidates, total_ptr=earlier, num_warps=8, **work
            )
        if ranks is not None:
            earlier = ranks.add_and_rank(earlier)
    shared = {
        "entropy_ptr": entropy.contiguous(),
        "mask_ptr": mask,
        "candidates_ptr": num_candidates,
        "earlier_ptr": earlier,
        "counts_ptr": counts,
        "ties_ptr": ties,
        "HAS_EARLIER": ranks is not None,
        "MAX_PROGRAMS": MAX_PROGRAMS,
        "num_warps": 8,
        **work,
        **_scalars(fraction, order, seed),
    }
    for digit, row in enumerate(counts):
        with torch.cuda.device_of(entropy):
            _histogram_kernel[grid](**shared, DIGIT=digit)
        if ranks is not None and digit < len(counts) - 1:
            ranks.add(row)
        elif ranks is not None:
            earlier_ties = ranks.add_and_rank(row)
    kept = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(entropy):
        _keep_kernel[grid](**shared, earlier_ties_ptr=earlier_ties, kept_ptr=kept.view(torch.uint8))
    return kept
