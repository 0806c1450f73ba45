"""What is done with the tiles of a head: statistics, gradients, or both from one projection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rft_kernels.objective import FunctionLoss, PolicyConfig, Tokens, evaluate
from rft_kernels.rows import at

from .grads import Grads
from .tiles import Head, counts_rows, split_rows


def stats_pass(
    head: Head,
    valid: Tensor,  # [T]
    active_rows: Tensor | None,  # [N], those that may have a gradient if the caller knows them
    only_active: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs [T], entropy [T], saved [T, k]."""
    rows, _ = split_rows(valid, valid, active_rows if only_active else None, only_active=True)
    out = head.new_stats()
    for tile, logits in head.tiles(rows, head.new_tile()):
        head.stats(tile, logits, valid, out)
    return out


def grad_pass(
    head: Head,
    num_classes: int,
    active_rows: Tensor | None,  # [N]
    entropy: Tensor,  # [T]
    saved: Tensor,  # [T, k]
    dlog_probs: Tensor | None,  # [T]
    dentropy: Tensor | None,  # [T]
    needs: Sequence[bool],
    dweight: Tensor | None,  # [V, D], added to
) -> tuple[Tensor, ...]:
    """Gradients as `Grads.finish` gives them."""
    active = torch.zeros_like(entropy, dtype=torch.bool)
    for scalar in (dlog_probs, dentropy):
        if scalar is not None:
            active = active | (scalar != 0)
    rows, _ = split_rows(active, active, active_rows, only_active=True)
    grads = Grads(head, needs, num_classes, dweight)
    for tile, logits in head.tiles(rows, head.new_tile()):
        per_row = (at(x, tile) for x in (entropy, saved, dlog_probs, dentropy))
        grads.add(tile, head.grad(tile, logits, *per_row))
    return grads.finish()


def policy_pass(
    head: Head,
    num_classes: int,
    valid: Tensor,  # [T]
    active: Tensor,  # [T]
    active_rows: Tensor | None,  # [N]
    only_active: bool,
    tokens: Tokens,
    config: PolicyConfig,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """log_probs, entropy, and the gradients of the sum of the tokens' losses."""
    rows, others = split_rows(valid, active, active_rows, only_active)
    out = log_probs, entropy, saved = head.new_stats()
    grads = Grads(head, needs, num_classes)
    buffer = head.new_tile()
    for tile, logits in head.tiles(rows, buffer):
        head.stats(tile, logits, valid, out)
        h = entropy[tile]
        result = evaluate(log_probs[tile], h, tokens.at(tile), config, head.backend)
        dlogits = head.grad(tile, logits, h, saved[tile], result.dlog_probs, result.dentropy)
        grads.add(tile, dlogits)
    for tile, logits in head.tiles(others, buffer):
        head.stats(tile, logits, valid, out)
    return log_probs, entropy, *grads.finish()


def function_pass(
    head: Head,
    num_classes: int,
    valid: Tensor,  # [T]
    active: Tensor,  # [T]
    active_rows: Tensor | None,  # [N]
    only_active: bool,
    loss: FunctionLoss,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """As `policy_pass`, of the rows' losses that `loss` takes."""
    rows, others = split_rows(valid, active, active_rows, only_active)
    out = log_probs, entropy, saved = head.new_stats()
    grads = Grads(head, needs, num_classes)
    buffer = head.new_tile()
    for tile, logits in head.tiles(rows, buffer):
        head.stats(tile, logits, valid, out)
        slopes = loss.take(tile, active[tile], log_probs[tile], entropy[tile])
        if not any(needs):
            continue
        if counts_rows(logits.device):
            tile, logits, slopes = _with_gradient(tile, logits, slopes)
        if len(tile):
            grads.add(tile, head.grad(tile, logits, entropy[tile], saved[tile], *slopes))
    for tile, logits in head.tiles(others, buffer):
        head.stats(tile, logits, valid, out)
    return log_probs, entropy, *grads.finish()


def _with_gradient(
    tile: Tensor, logits: Tensor, slopes: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The rows of a tile of which a derivative is not 0; their logits moved to the buffer's front.

    One by one, since a gather would be a second buffer.
    """
    active = torch.zeros_like(tile, dtype=torch.bool)
    for slope in slopes:
        if slope is not None:
            active |= slope != 0
    kept = active.nonzero().squeeze(-1)
    for place, row in enumerate(kept.tolist() if len(kept) < len(tile) else ()):
        if place < row:
            logits[place] = logits[row]
    return tile[kept], logits[: len(kept)], [at(slope, kept) for slope in slopes]
