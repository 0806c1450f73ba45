"""A trial: loss and gradient from logits in one launch, each row's second read out of L2.

    python -m bench.one_launch [--smoke] [--out FILE.csv] [--budget-s 180]

T rows, V classes, N programs, M sums. A fixed number of programs, each strides over the rows. A row
is read once for its statistics (E1); its token's two derivatives follow at once (E4 to E7), as the
ratio is the token's and nothing is to be selected; then the row is read backwards, the part read
last first, and its gradient written (E2). What the L2 can hold of the rows at work is kept there by
eviction hints, all else passes through; a row without gradient is not read again.

The floor is 2 T V bytes, the logits read and the gradient written, at the speed of a copy measured
in the same run. Against it, on the same inputs: `prefix_rft_loss` with `selected_mask`, and its
three kernels alone, which read the active share of the rows a second time.
"""

import itertools
import os
from functools import partial
from typing import NamedTuple

import torch

from bench.harness import require_triton

if __name__ == "__main__":
    require_triton("bench.one_launch")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # a smoke run; before triton is imported

import triton
import triton.language as tl
from rft_kernels import PolicyConfig
from rft_kernels.objective import DEFAULT_CONFIG, Tokens
from rft_kernels.objective.policy_config import SUMS
from rft_kernels.objective.triton_backend import (
    _PADDED,
    _load_masks,
    _sum_kernel,
    objective_fwd,
    pointer,
    store_sums,
    take_tokens,
)
from rft_kernels.rows import Slopes
from rft_kernels.rows.launch import row_launch
from rft_kernels.rows.online import LOG2_E, join_lanes, start_lanes, take_tile
from rft_kernels.rows.triton_backend import _grad, _tile, row_grad, row_stats
from torch import Tensor

from bench.device import ACTIVE_SHARES, CASES, Bench, run
from bench.policy_loss import ERROR_ROWS, Batch, both, error_columns, exact_loss, ours

PROGRAMS_AND_WARPS = ((1, 16), (1, 8), (2, 8), (2, 4))  # programs: of a multiprocessor
STAGES = (4, 2)
KEPT_OF_L2 = 0.75  # what is being written passes through it too


class Launch(NamedTuple):
    """How the kernel is launched; a tile is `depth * lanes` classes."""

    num_programs: int
    lanes: int
    depth: int
    num_warps: int
    num_stages: int
    l2_bytes: float  # of rows that may stay in L2


def default_launch(logits: Tensor) -> Launch:
    """One program a multiprocessor, with the tiles of the statistics."""
    row = row_launch(logits)
    if not logits.is_cuda:
        return Launch(2, *row, l2_bytes=0)
    device = torch.cuda.get_device_properties(logits.device)
    kept = KEPT_OF_L2 * device.L2_cache_size
    return Launch(device.multi_processor_count, *row, l2_bytes=kept)


@triton.jit
def _one_launch_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T], negative: none
    old_ptr,  # [T]
    advantages_ptr,  # [T]
    mask_ptr,  # [T] uint8
    prefix_ptr,  # [T] uint8
    rollout_ptr,  # [T]
    ref_ptr,  # [T]
    log_probs_ptr,  # [T], out
    entropy_ptr,  # [T], out
    dlogits_ptr,  # [T, V], out
    partial_ptr,  # [M, N], out
    low,
    high,
    prefix_low,
    prefix_high,
    dual_clip,
    cap,
    entropy_coef,
    kl_coef,
    logits_row_stride,
    dlogits_row_stride,
    num_rows,
    num_classes,
    num_kept,  # last classes of a row that shall stay in L2
    HAS_OLD: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_CAP: tl.constexpr,
    KL: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    num_tiles = num_classes // (DEPTH * LANES)  # that need no mask
    whole = num_tiles * (DEPTH * LANES)
    rest = _tile(whole, DEPTH, LANES)
    zeros = tl.zeros([DEPTH, LANES], dlogits_ptr.dtype.element_ty)
    sums = tl.zeros((_PADDED,), tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        offsets = row + tl.arange(0, 1)
        asked, mask, prefix = _load_masks(
            mask_ptr, prefix_ptr, rollout_ptr, offsets, num_rows, HAS_PREFIX, HAS_CAP
        )
        target = tl.load(targets_ptr + row).to(tl.int64)
        x_ptr = logits_ptr + row * logits_row_stride
        dx_ptr = dlogits_ptr + row * dlogits_row_stride
        g, h = 0.0, 0.0
        if target >= 0:
            kept = num_kept
            if not HAS_BONUS and KL == "none":
                advantage = tl.load(advantages_ptr + row).to(tl.float32)
                has_slope = (tl.max(mask.to(tl.int32), 0) != 0) & (advantage != 0)
                kept = tl.where(has_slope, kept, 0)  # else it is not read again
            passing = tl.maximum(num_classes - kept, 0) // (DEPTH * LANES) * (DEPTH * LANES)
            m, s, w = start_lanes(LANES, tl.float32)
            for start in tl.range(0, passing, DEPTH * LANES, num_stages=NUM_STAGES):
                col = _tile(start, DEPTH, LANES)
                x = tl.load(x_ptr + col, eviction_policy="evict_first").to(tl.float32)
                m, s, w = take_tile(m, s, w, x, LOG2_E)
            for start in tl.range(passing, whole, DEPTH * LANES, num_stages=NUM_STAGES):
                col = _tile(start, DEPTH, LANES)
                x = tl.load(x_ptr + col, eviction_policy="evict_last").to(tl.float32)
                m, s, w = take_tile(m, s, w, x, LOG2_E)
            if whole < num_classes:
                x = tl.load(x_ptr + rest, rest < num_classes, -float("inf")).to(tl.float32)
                m, s, w = take_tile(m, s, w, x, LOG2_E)
            maximum, total, weighted = join_lanes(m, s, w, LOG2_E)
            log_total = tl.log(total)
            at_target = tl.load(x_ptr + target, target < num_classes, float("nan")).to(tl.float32)
            log_prob = at_target - maximum - log_total
            entropy = log_total - weighted / total / LOG2_E
            entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(log_probs_ptr + row, log_prob)
            tl.store(entropy_ptr + row, entropy)

            sums, slope, dentropy = take_tokens(
                sums, tl.where(mask, log_prob, 0.0), tl.where(mask, entropy, 0.0), 0.0, 0.0,
                advantages_ptr, old_ptr, rollout_ptr, ref_ptr, offsets, asked, mask, prefix, low,
                high, prefix_low, prefix_high, dual_clip, cap, entropy_coef, kl_coef, HAS_OLD,
                True, HAS_BONUS, HAS_DUAL, HAS_CAP, KL, False,
            )  # fmt: skip
            g, h = tl.sum(slope, 0), tl.sum(dentropy, 0)
            if (g != 0) | (h != 0):
                scale = h / LOG2_E / total
                base = (g + h * (entropy - log_total)) / total
                if whole < num_classes:
                    x = tl.load(x_ptr + rest, rest < num_classes, -float("inf")).to(tl.float32)
                    dx = _grad(x, rest, target, g, base, scale, maximum, LOG2_E, None)
                    tl.store(dx_ptr + rest, dx.to(zeros.dtype), rest < num_classes)
                for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
                    col = _tile((num_tiles - 1 - i) * (DEPTH * LANES), DEPTH, LANES)
                    x = tl.load(x_ptr + col, eviction_policy="evict_first").to(tl.float32)
                    dx = _grad(x, col, target, g, base, scale, maximum, LOG2_E, None)
                    tl.store(dx_ptr + col, dx.to(zeros.dtype), eviction_policy="evict_first")
        else:
            tl.store(log_probs_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
        if (g == 0) & (h == 0):
            for start in range(0, whole, DEPTH * LANES):
                col = _tile(start, DEPTH, LANES)
                tl.store(dx_ptr + col, zeros, eviction_policy="evict_first")
            tl.store(dx_ptr + rest, zeros, rest < num_classes)
    store_sums(partial_ptr, sums, program)


def one_launch_fwd(
    logits: Tensor,  # [T, V], columns side by side
    targets: Tensor,  # [T], negative: none, and then not in the loss
    old_log_probs: Tensor | None,  # [T]
    advantages: Tensor,  # [T]
    loss_mask: Tensor,  # [T] bool
    prefix_mask: Tensor | None,  # [T] bool
    rollout_log_probs: Tensor | None,  # [T]
    ref_log_probs: Tensor | None,  # [T]
    config: PolicyConfig,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SUMS [M], the gradient of their first by the logits; log_probs and entropy [T]."""
    num_rows, num_classes = logits.shape
    num_programs = max(min(launch.num_programs, num_rows), 1)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    log_probs = logits.new_empty(num_rows, dtype=torch.float32)
    entropy = torch.empty_like(log_probs)
    partial = log_probs.new_empty(len(SUMS), num_programs)
    sums = log_probs.new_empty(len(SUMS))
    low, high, prefix_low, prefix_high = config.terms.clip_range
    num_kept = int(min(launch.l2_bytes / num_programs / logits.itemsize, num_classes))

    with torch.cuda.device_of(logits):
        _one_launch_kernel[(num_programs,)](
            logits_ptr=logits,
            targets_ptr=targets.contiguous(),
            old_ptr=pointer(old_log_probs),
            advantages_ptr=pointer(advantages),
            mask_ptr=pointer(loss_mask),
            prefix_ptr=pointer(prefix_mask),
            rollout_ptr=pointer(rollout_log_probs),
            ref_ptr=pointer(ref_log_probs),
            log_probs_ptr=log_probs,
            entropy_ptr=entropy,
            dlogits_ptr=dlogits,
            partial_ptr=partial,
            low=low,
            high=high,
            prefix_low=prefix_low,
            prefix_high=prefix_high,
            dual_clip=0.0 if config.dual_clip is None else config.dual_clip,
            cap=0.0 if config.importance_cap is None else config.importance_cap,
            entropy_coef=config.entropy_coef,
            kl_coef=config.kl_coef,
            logits_row_stride=logits.stride(0),
            dlogits_row_stride=num_classes,
            num_rows=num_rows,
            num_classes=num_classes,
            num_kept=num_kept,
            HAS_OLD=old_log_probs is not None,
            HAS_PREFIX=prefix_mask is not None,
            HAS_BONUS=config.entropy_coef != 0,
            HAS_DUAL=config.dual_clip is not None,
            HAS_CAP=config.importance_cap is not None,
            KL=config.kl if config.uses_kl else "none",
            DEPTH=launch.depth,
            LANES=launch.lanes,
            NUM_STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
        _sum_kernel[(len(SUMS),)](
            partial_ptr=partial, sums_ptr=sums, num_programs=num_programs, TILE=512, num_warps=4
        )
    return sums, dlogits, log_probs, entropy


def one_launch_loss(
    logits: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    prefix_mask: Tensor | None,
    config: PolicyConfig = DEFAULT_CONFIG,
    *,
    rollout_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss summed over the tokens of `loss_mask`, 0-dim, and its gradient by the logits.

    As `prefix_rft_loss` over a normalizer of 1, of [T, V] logits in float32 or narrower, with
    `loss_mask` the response without the prefix tokens that are not selected. Deterministic.

    Raises:
        ValueError: a ratio of the sequence, logits in float64, or columns that are not neighbours.
    """
    if not config.depends_on_row_alone:
        raise ValueError(
            f'config.importance_level must be "token", got {config.importance_level!r}'
        )
    if logits.dtype == torch.float64 or logits.stride(-1) != 1:
        raise ValueError(
            "logits must be float32 or narrower, of column stride 1, "
            f"got {logits.dtype} of strides {logits.stride()}"
        )
    sums, dlogits, _, _ = one_launch_fwd(
        logits, targets, old_log_probs, advantages, loss_mask, prefix_mask, rollout_log_probs,
        ref_log_probs, config, launch or default_launch(logits),
    )  # fmt: skip
    return sums[0], dlogits


def one_launch(logits: Tensor, batch: Batch, *, launch: Launch) -> tuple[Tensor, Tensor]:
    return one_launch_loss(
        logits.detach(), batch.targets, batch.old_log_probs, batch.advantages, batch.response_mask,
        batch.prefix_mask, launch=launch,
    )  # fmt: skip


def three_launches(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The kernels that `prefix_rft_loss` launches, without what surrounds them."""
    logits = logits.detach()
    found = row_stats(logits, batch.targets, batch.response_mask, 1.0, None, 0)
    log_probs, entropy, saved = found.log_probs, found.entropy, found.saved
    tokens = Tokens(batch.advantages, batch.response_mask, batch.old_log_probs, batch.prefix_mask)
    sums, dlog_probs, _ = objective_fwd(log_probs, entropy, tokens, DEFAULT_CONFIG.terms, None)
    dlogits = torch.empty_like(logits)
    row_grad(dlogits, logits, batch.targets, 1.0, None, entropy, saved, Slopes(dlog_probs), 0)
    return sums[0], dlogits


def launches(logits: Tensor, *, smoke: bool) -> dict[str, Launch]:
    """Programs a multiprocessor, their warps and stages; and how much of L2 the rows may hold."""
    default = default_launch(logits)
    found = {}
    for (programs, warps), stages in itertools.product(PROGRAMS_AND_WARPS, STAGES):
        found[f"one launch, {programs} x {warps} warps, {stages} stages"] = default._replace(
            num_programs=programs * default.num_programs, num_warps=warps, num_stages=stages
        )
    name, first = next(iter(found.items()))
    if smoke:
        return {name: first}
    found[f"{name}, nothing kept"] = first._replace(l2_bytes=0.0)
    found[f"{name}, all kept"] = first._replace(l2_bytes=torch.inf)
    return found


def measure(bench: Bench, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits, facts = bench.logits(num_tokens, vocab_size, dtype)
    if logits is None:
        return
    whole = {
        "ours, prefix_rft_loss": partial(both, partial(ours, selected=True)),
        "ours, three launches": three_launches,
    }
    trials = {
        name: partial(one_launch, launch=launch)
        for name, launch in launches(logits, smoke=bench.smoke).items()
    }
    for share in ACTIVE_SHARES[:2] if bench.smoke else ACTIVE_SHARES:
        batch, few = Batch(logits, share), Batch(logits, share, num_rows=ERROR_ROWS)
        calls, wrong = {}, {}
        for name, call in (whole | trials).items():
            exact = exact_loss if call is whole["ours, prefix_rft_loss"] else exact_sum
            wrong[name] = bench.attempt(name, partial(error_columns, call, exact, logits, few))
            if wrong[name]:
                calls[name] = partial(call, logits, batch)
        bench.add(
            facts | {"pass": "both", "active": share},
            calls,
            floor_bytes=2 * logits.nbytes,
            share=0.25,
            columns=wrong,
        )


def exact_sum(logits: Tensor, batch: Batch) -> Tensor:
    return exact_loss(logits, batch) * batch.normalizer


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        cases=CASES,
        smoke_cases=[(4, 67, torch.bfloat16)],
        tests=["tests/kernels/test_one_launch.py", "tests/kernels/test_policy_loss_triton.py"],
        smoke_test="tests/kernels/test_one_launch.py::test_rows_outside_the_loss",
    )
