"""Chunked torch: the two vocabulary-sized primitives, a few rows at a time (E1, E2).

T rows, V classes. A block of rows is widened to the dtype of the statistics, so at most
`scratch_bytes` of vocabulary-sized temporaries live at once (one row's worth at least). Reads each
row once per primitive; rows that are not `valid`, or whose two gradient scalars are zero, are not
read on a CPU. On a device every row is read and the result of such rows is discarded, since leaving
them out would need their number on the host.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..results import stats_dtype
from .scalars import RowStats, Slopes

# On a CPU what a last-level cache holds; on a device enough that launches do not count.
_SCRATCH_BYTES = {"cpu": 2**24, "cuda": 2**28}
_COPIES = 4  # block-sized tensors alive at once: logits, slope, p, log p
NUM_SAVED = 0  # numbers a row that row_grad wants back from row_stats
_LOWEST_LOG_P = -1e4  # e^x is 0 long before, in float64 too, so that 0 * log 0 is 0


def row_bytes(vocab_size: int, dtype: torch.dtype) -> int:
    """Scratch that one row of logits of this dtype takes."""
    return _COPIES * vocab_size * stats_dtype(dtype).itemsize


def default_scratch(device: torch.device) -> int:
    return _SCRATCH_BYTES.get(device.type, _SCRATCH_BYTES["cuda"])


def row_stats(
    logits: Tensor,  # [T, V], any row stride
    targets: Tensor,  # [T]
    valid: Tensor,  # [T] bool
    temperature: float | Tensor,  # or [T]
    softcap: float | None,
    scratch_bytes: int,
    squares: bool = False,
) -> RowStats:
    """The statistics of each valid row, 0 elsewhere; nothing saved."""
    num_rows, vocab_size = logits.shape
    dtype = stats_dtype(logits.dtype)
    log_probs = torch.zeros(num_rows, dtype=dtype, device=logits.device)
    entropy, lse = torch.zeros_like(log_probs), torch.zeros_like(log_probs)
    sum_of_squares = torch.zeros_like(log_probs) if squares else None
    in_range = (targets >= 0) & (targets < vocab_size)
    index = torch.where(in_range, targets, 0).long()
    for rows in _blocks(valid, logits, scratch_bytes):
        z, _ = _scaled(logits[rows], at(temperature, rows), softcap, dtype)
        maximum = z.amax(-1, keepdim=True)
        z = z - maximum
        p = torch.softmax(z, -1)
        log_sum = 0 - p.amax(-1).log()  # the largest p is e^0 over the sum; and 0 - 0 is not -0
        log_probs[rows] = z.gather(-1, index[rows, None]).squeeze(-1) - log_sum
        lse[rows] = maximum.squeeze(-1) + log_sum
        if sum_of_squares is not None:
            sum_of_squares[rows] = p.square().sum(-1)
        entropy[rows] = log_sum - p.mul_(z.clamp_(min=_LOWEST_LOG_P)).sum(-1)
    log_probs = torch.where(in_range, log_probs, torch.nan)
    log_probs, entropy, lse = (torch.where(valid, x, 0) for x in (log_probs, entropy, lse))
    if sum_of_squares is not None:
        sum_of_squares = torch.where(valid, sum_of_squares, 0)
    saved = log_probs.new_empty(num_rows, NUM_SAVED)
    return RowStats(log_probs, entropy, lse, saved, sum_of_squares)


def row_grad(
    out: Tensor,  # [T, V], written; may be logits
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T]
    temperature: float | Tensor,  # or [T]
    softcap: float | None,
    entropy: Tensor,  # [T]
    saved: Tensor,  # [T, 0]; [T, 2] where the logits are a part of the row: its maximum and sum
    slopes: Slopes,
    scratch_bytes: int,
) -> None:
    """dz_j = g (1[j = y] - p_j) - h p_j (log p_j + H) + l p_j + q p_j^2, and on to the logits."""
    dtype = stats_dtype(logits.dtype)
    g, h, lse_slope, squared = slopes
    g = torch.zeros_like(entropy) if g is None else g
    of_p = g if lse_slope is None else g - lse_slope
    active = slopes.active(entropy)
    here = (targets >= 0) & (targets < logits.shape[1])
    index, g_here = torch.where(here, targets, 0).long(), torch.where(here, g, 0)
    for rows in _blocks(active, logits, scratch_bytes):
        t = at(temperature, rows)
        z, slope = _scaled(logits[rows], t, softcap, dtype)
        factor = (of_p[rows] / t)[:, None]
        dz = _softmax(z, saved[rows], t)
        if h is not None:
            log_p = _softmax(z, saved[rows], t, log=True).clamp_(min=_LOWEST_LOG_P)
            factor = log_p.add_(entropy[rows, None]).mul_((h[rows] / t)[:, None]).add_(factor)
        if squared is not None:
            factor = torch.addcmul(factor, dz, (squared[rows] / t)[:, None], value=-1)
        dz.mul_(factor.neg_())
        dz.scatter_add_(-1, index[rows, None], (g_here[rows] / t)[:, None])
        if slope is not None:
            dz.mul_(slope)
        if out.device.type != "cpu":
            dz.masked_fill_(~active[rows, None], 0)
        out[rows] = dz.to(out.dtype)
    if out.device.type == "cpu":
        out.index_fill_(0, (~active).nonzero().squeeze(-1), 0)


def _softmax(z: Tensor, saved: Tensor, temperature: float | Tensor, *, log: bool = False) -> Tensor:
    """p or log p; where z is a part of a row, by that row's maximum (untempered) and sum."""
    if saved.shape[1] == 0:
        return torch.log_softmax(z, -1) if log else torch.softmax(z, -1)
    maximum, total = saved.unbind(1)
    shifted = z - (maximum / temperature)[:, None]
    return shifted.sub_(total.log()[:, None]) if log else shifted.exp_().div_(total[:, None])


def _blocks(chosen: Tensor, logits: Tensor, scratch_bytes: int) -> Iterator[slice | Tensor]:
    """Slices of all rows, or on a CPU index vectors of the chosen ones if some are not."""
    num_rows, vocab_size = logits.shape
    size = max(1, scratch_bytes // row_bytes(vocab_size, logits.dtype))
    if chosen.device.type == "cpu" and not chosen.all():
        rows = chosen.nonzero().squeeze(-1)
        yield from rows.split(size) if len(rows) else ()
    else:
        for start in range(0, num_rows, size):
            yield slice(start, start + size)


def at(x: float | Tensor | None, rows: slice | Tensor) -> float | Tensor | None:
    """The rows of a per-row argument; a number or None holds for all."""
    return x[rows] if isinstance(x, Tensor) else x


def _scaled(
    logits: Tensor, temperature: float | Tensor, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """z = softcap(logits) / temperature, and the slope of the softcap."""
    z, slope = logits.to(dtype), None
    if softcap is not None:
        z = torch.tanh(z / softcap)
        slope = 1 - z * z
        z *= softcap
    if isinstance(temperature, Tensor):
        z = z / temperature.to(dtype)[:, None]
    elif temperature != 1:
        z = z / temperature
    return z, slope
