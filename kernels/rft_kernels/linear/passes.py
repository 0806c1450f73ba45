"""What is done with the tiles of a head: statistics, gradients, or both from one projection."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import at
from .grads import Grads
from .tiles import Head, Rows, counts_rows, split_rows

Slopes = Sequence[Tensor | None]  # the two derivatives of rows' losses [n]; None: 0 for all


class Saved(NamedTuple):
    """What the statistics keep for the gradient, and the gradients that come in."""

    entropy: Tensor  # [T]
    saved: Tensor  # [T, k]
    dlog_probs: Tensor | None  # [T]
    dentropy: Tensor | None  # [T]


def stats_pass(head: Head, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs [T], entropy [T], saved [T, k]."""
    wanted = rows._replace(active=rows.valid, listed=rows.listed if rows.only_active else None)
    every, _ = split_rows(wanted)
    out = head.new_stats()
    for tile, logits in head.tiles(every, head.new_tile()):
        head.stats(tile, logits, rows.valid, out)
    return out


def grad_pass(
    head: Head,
    listed: Tensor | None,  # [N]
    saved: Saved,
    needs: Sequence[bool],
    dweight: Tensor | None,  # [V, D], added to
) -> tuple[Tensor, ...]:
    """Gradients as `Grads.finish` gives them."""
    active = has_gradient(saved.entropy, (saved.dlog_probs, saved.dentropy))
    rows, _ = split_rows(Rows(active, active, listed, only_active=True))
    grads = Grads(head, needs, dweight)
    for tile, logits in head.tiles(rows, head.new_tile()):
        grads.add(tile, head.grad(tile, logits, *(at(x, tile) for x in saved)))
    return grads.finish()


def loss_pass(
    head: Head,
    rows: Rows,
    derivatives: Callable[[Tensor, Tensor, Tensor], Slopes],
    needs: Sequence[bool],
    *,
    drop: bool = False,
) -> tuple[Tensor, ...]:
    """log_probs, entropy, and the gradients of the sum of the rows' losses.

    derivatives: from the indices of a tile and its log_probs and entropy.
    drop: where rows are counted, those without a derivative leave the tile.
    """
    active, others = split_rows(rows)
    out = log_probs, entropy, saved = head.new_stats()
    grads = Grads(head, needs)
    buffer = head.new_tile()
    for tile, logits in head.tiles(active, buffer):
        head.stats(tile, logits, rows.valid, out)
        slopes = derivatives(tile, log_probs[tile], entropy[tile])
        if not any(needs):
            continue
        if drop and counts_rows(logits.device):
            tile, logits, slopes = _with_gradient(tile, logits, slopes)
        grads.add(tile, head.grad(tile, logits, entropy[tile], saved[tile], *slopes))
    for tile, logits in head.tiles(others, buffer):
        head.stats(tile, logits, rows.valid, out)
    return log_probs, entropy, *grads.finish()


def has_gradient(like: Tensor, slopes: Slopes) -> Tensor:
    """Rows of which a derivative is not 0, bool of the shape of `like`."""
    active = torch.zeros_like(like, dtype=torch.bool)
    for slope in slopes:
        if slope is not None:
            active = active | (slope != 0)
    return active


def _with_gradient(tile: Tensor, logits: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor, Slopes]:
    """The rows of a tile with a gradient; their logits are moved to the front of the buffer.

    One by one, since a gather would be a second buffer.
    """
    kept = has_gradient(tile, slopes).nonzero().squeeze(-1)
    for place, row in enumerate(kept.tolist()):
        if place < row:
            logits[place] = logits[row]
    return tile[kept], logits[: len(kept)], [at(slope, kept) for slope in slopes]
