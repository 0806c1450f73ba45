"""Statistics of every row of logits, and their gradient (E1, E2).

T rows, V classes. Reads T V elements forward; backward reads and writes the rows whose incoming
gradients are not both zero.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _check, _dispatch
from .._bundle import bundled_op
from ..results import LseStats, TokenStats
from .backends import new_stats, row_backend
from .scalars import Slopes
from .torch_backend import default_scratch


def matrices(logits: Tensor) -> list[Tensor]:
    """`[..., V]` as `[rows, V]` views in order: one if the strides allow it, and never a copy."""
    if logits.dim() <= 2 or logits.numel() == 0:
        return [logits.reshape(-1, logits.shape[-1])]
    shape, stride = logits.shape, logits.stride()
    if all(stride[i] == stride[i + 1] * shape[i + 1] for i in range(logits.dim() - 2)):
        return [logits.view(-1, shape[-1])]
    return [matrix for part in logits.unbind(0) for matrix in matrices(part)]


def row_slices(temperature: float | Tensor, *rest: Tensor | None, sizes: list[int]) -> Any:
    """Per-row arguments cut to the sizes of the matrices; numbers and None are repeated."""
    arguments = (temperature, *rest)
    cut = [x.split(sizes) if isinstance(x, Tensor) else [x] * len(sizes) for x in arguments]
    return zip(*cut, strict=True)


@bundled_op("token_stats")
def _token_stats_fwd(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [T]
    valid: Tensor,  # [T]
    row_temperature: Tensor | None,  # [T]
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    inplace_backward: bool,
    squares: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowStats`; no squares unless asked for."""
    parts = [matrix[:, :vocab_size] for matrix in matrices(logits)]
    t = temperature if row_temperature is None else row_temperature
    per_row = row_slices(t, targets, valid, sizes=[len(part) for part in parts])
    row_stats = row_backend(backend).row_stats
    scratch = default_scratch(logits.device)
    stats = [
        row_stats(part, targets, valid, t, softcap, scratch, squares)
        for part, (t, targets, valid) in zip(parts, per_row, strict=True)
    ]
    if not squares:
        stats = [x._replace(squares=x.lse.new_empty(0)) for x in stats]
    return tuple(stats[0] if len(stats) == 1 else map(torch.cat, zip(*stats, strict=True)))


@_token_stats_fwd.register_fake
def _(logits, targets, *options):
    *_, squares, backend = options
    *found, _ = new_stats(logits, len(targets), row_backend(backend).NUM_SAVED)
    return *found, found[0].new_empty(len(targets) if squares else 0)


def _write_grad(
    out, logits, targets, row_temperature, temperature, softcap, vocab_size, backend, *rows
) -> None:
    parts, outs = matrices(logits), matrices(out)
    if len(outs) < len(parts):
        outs = out.view(-1, out.shape[-1]).split([len(part) for part in parts])
    t = temperature if row_temperature is None else row_temperature
    per_row = row_slices(t, targets, *rows, sizes=[len(part) for part in parts])
    row_grad = row_backend(backend).row_grad
    scratch = default_scratch(logits.device)
    for part, into, (t, targets, entropy, saved, *rest) in zip(parts, outs, per_row, strict=True):
        part, written = part[:, :vocab_size], into[:, :vocab_size]
        row_grad(written, part, targets, t, softcap, entropy, saved, Slopes(*rest), scratch)
        into[:, vocab_size:] = 0


@bundled_op("token_stats_bwd")
def _token_stats_bwd(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [T]
    row_temperature: Tensor | None,  # [T]
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    backend: str,
    entropy: Tensor,  # [T]
    saved: Tensor,  # [T, k]
    slopes: Slopes,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = (row_temperature, temperature, softcap, vocab_size, backend)
    _write_grad(out, logits, targets, *options, entropy, saved, *slopes)
    return out


@_token_stats_bwd.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@bundled_op("token_stats_bwd_", mutates_args={"logits"})
def _token_stats_bwd_(
    logits: Tensor,  # [..., V], overwritten by its gradient
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    backend: str,
    entropy: Tensor,
    saved: Tensor,
    slopes: Slopes,
) -> None:
    options = (row_temperature, temperature, softcap, vocab_size, backend)
    _write_grad(logits, logits, targets, *options, entropy, saved, *slopes)


@_token_stats_bwd_.register_fake
def _(*_):
    return None


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, valid, row_temperature, *ctx.options = inputs
    _, entropy, _, saved, squares = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(logits, targets, valid, row_temperature, entropy, saved, squares)


def _backward(ctx, dlog_probs, dentropy, dlse, _, dsquares):
    logits, targets, valid, row_temperature, entropy, saved, squares = ctx.saved_tensors
    *options, inplace_backward, asked_for_squares, backend = ctx.options
    rest = (None,) * 9
    if not asked_for_squares:
        dsquares = None
    slopes = Slopes(dlog_probs, dentropy, dlse)
    if dsquares is not None:
        of_p = -2 * squares * dsquares
        slopes = Slopes(
            dlog_probs, dentropy, of_p if dlse is None else dlse + of_p, squared=2 * dsquares
        )
    if all(slope is None for slope in slopes):
        return None, *rest
    slopes = Slopes(*(None if x is None else torch.where(valid, x, 0) for x in slopes))
    arguments = (targets, row_temperature, *options, backend, entropy, saved, slopes)
    if inplace_backward:
        _token_stats_bwd_(logits, *arguments)
        return logits, *rest
    return _token_stats_bwd(logits, *arguments), *rest


_token_stats_fwd.register_autograd(_backward, setup_context=_setup_context)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability of the target and entropy of softmax(logits / temperature), row by row.

        log_prob = z_y - lse(z),  H = -sum_j p_j log p_j,  z = logits / temperature,  p = softmax(z)
        softcap c: logits = c tanh(logits / c), before the temperature

    Args:
        logits: [..., V] float16, bfloat16, float32 or float64; rows may be strided; entries may be
            -inf.
        targets: [...] int64 or int32, already shifted; -100 = no target.
        softcap: above 0, in units of the logits; an entry of -inf becomes -c.
        temperature: above 0; a number, or [...] one a row, of no effect in rows without an output.
            Applied in the dtype of the statistics.
        row_mask: [...] bool; rows that are False give 0 and get no gradient, whatever they hold.
        vocab_size: columns from here on are padding: never part of the softmax, gradient exactly 0.
        inplace_backward: the backward writes the gradient over `logits`, which must not be needed
            afterwards (the output of a linear layer is not); a second backward then raises.
        backend: "auto" (triton on CUDA where it is installed, else torch), "torch" or "triton".
    Returns:
        TokenStats of shape [...]; rows without a target are 0.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range. Tensors are
            looked at on a CPU only; elsewhere a target outside the vocabulary makes its log_prob
            NaN.
    Both outputs are differentiable once in `logits`. Deterministic. Reads every row once; the
    backward reads and writes the rows whose incoming gradients are not both zero.
    """
    return TokenStats(
        *_row_stats(
            logits,
            targets,
            softcap=softcap,
            temperature=temperature,
            row_mask=row_mask,
            vocab_size=vocab_size,
            inplace_backward=inplace_backward,
            backend=backend,
        )[:2]
    )


def token_stats_with_lse(logits: Tensor, targets: Tensor, **options: Any) -> LseStats:
    """`token_stats`, and lse = log sum_j e^(z_j); `options` are those of `token_stats`.

    All three are differentiable, the lse for no more work: its gradient by z is p.
    """
    return LseStats(*_row_stats(logits, targets, **options)[:3])


def sum_squared_probs(logits: Tensor, **options: Any) -> Tensor:
    """sum_j p_j^2 of every row, [...], 0 where `row_mask` is False.

    Args:
        logits, options: those of `token_stats`.
    Raises:
        TypeError, ValueError: as `token_stats`.
    Differentiable once in `logits`. Deterministic. Reads every row once; the backward reads and
    writes the rows with a gradient.
    """
    _check.tensor("logits", logits)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    *_, squares = _row_stats(logits, targets, squares=True, **options)
    return squares.clone()  # its own is saved for the backward


def _row_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
    squares: bool = False,
) -> list[Tensor]:
    """log_probs, entropy, lse and, if wanted, sums of squares: [...] each."""
    _check.tensor("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V at least 1, got {list(logits.shape)}")
    shape = logits.shape[:-1]
    if vocab_size is None:
        vocab_size = logits.shape[-1]
    _check.integer("vocab_size", vocab_size, least=1, most=logits.shape[-1])
    if softcap is not None:
        _check.number("softcap", softcap, above=0)
    valid = check_rows(logits, shape, targets, temperature, row_mask, vocab_size)
    if inplace_backward and _may_repeat_memory(logits):
        raise ValueError(
            f"inplace_backward needs logits whose entries have memory of their own, got strides "
            f"{list(logits.stride())} of shape {list(logits.shape)}"
        )
    per_row = isinstance(temperature, Tensor)
    log_probs, entropy, lse, _, sum_of_squares = _token_stats_fwd(
        logits,
        targets.reshape(-1),
        valid.reshape(-1),
        temperature.detach().reshape(-1) if per_row else None,
        1.0 if per_row else float(temperature),
        None if softcap is None else float(softcap),
        vocab_size,
        inplace_backward,
        squares,
        _dispatch.resolve(backend, logits.device),
    )
    found = [log_probs.view(shape), entropy.view(shape).clone(), lse.view(shape)]
    return [*found, sum_of_squares.view(shape)] if squares else found


def _may_repeat_memory(x: Tensor) -> bool:
    """Whether a stride is smaller than what the smaller ones reach: views of expand, as_strided."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_rows(
    like: Tensor,
    shape: torch.Size,
    targets: Tensor,
    temperature: float | Tensor,
    row_mask: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Checks what every statistics op takes per row; returns the rows that have an output."""
    _check.tensor("targets", targets, dtypes=_check.INTEGERS, shape=shape, like=like)
    if row_mask is None:
        valid = targets != _check.NO_TARGET
    else:
        _check.mask("row_mask", row_mask, targets)
        valid = row_mask & (targets != _check.NO_TARGET)
    _check.targets(targets, valid, vocab_size)
    _check.temperature(temperature, like, valid)
    return valid
