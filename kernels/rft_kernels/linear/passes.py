"""What is done with the tiles of a head: statistics, gradients, or both from one projection."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..rows import RowStats, Slopes, at
from .grads import Grads
from .tiles import Head, Rows, counts_rows, split_rows


class Saved(NamedTuple):
    """What the statistics keep for the gradient."""

    entropy: Tensor  # [T]
    saved: Tensor  # [T, k]


def stats_pass(head: Head, rows: Rows) -> RowStats:
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
    slopes: Slopes,
    needs: Sequence[bool],
    dweight: Tensor | None,  # [V, D], added to
) -> tuple[Tensor, ...]:
    """Gradients as `Grads.finish` gives them."""
    active = slopes.active(saved.entropy)
    rows, _ = split_rows(Rows(active, active, listed, only_active=True))
    grads = Grads(head, needs, dweight)
    for tile, logits in head.tiles(rows, head.new_tile()):
        grads.add(tile, head.grad(tile, logits, *(x[tile] for x in saved), _of(slopes, tile)))
    return grads.finish()


def loss_pass(
    head: Head,
    rows: Rows,
    derivatives: Callable[[Tensor, RowStats], Slopes],
    needs: Sequence[bool],
    *,
    drop: bool = False,
) -> tuple[Tensor, ...]:
    """log_probs, entropy, lse, and the gradients of the sum of the rows' losses.

    derivatives: from the indices of a tile and its statistics.
    drop: where rows are counted, those without a derivative leave the tile.
    """
    active, others = split_rows(rows)
    out = head.new_stats()
    grads = Grads(head, needs)
    buffer = head.new_tile()
    for tile, logits in head.tiles(active, buffer):
        head.stats(tile, logits, rows.valid, out)
        slopes = derivatives(tile, RowStats(*(x[tile] for x in out[:-1])))
        if not any(needs):
            continue
        if drop and counts_rows(logits.device):
            tile, logits, slopes = _with_gradient(tile, logits, slopes)
        grads.add(tile, head.grad(tile, logits, out.entropy[tile], out.saved[tile], slopes))
    for tile, logits in head.tiles(others, buffer):
        head.stats(tile, logits, rows.valid, out)
    return *out[:3], *grads.finish()


def _of(slopes: Slopes, rows: Tensor) -> Slopes:
    return Slopes(*(at(slope, rows) for slope in slopes))


def _with_gradient(tile: Tensor, logits: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor, Slopes]:
    """The rows of a tile with a gradient; their logits are moved to the front of the buffer.

    One by one, since a gather would be a second buffer.
    """
    kept = slopes.active(tile).nonzero().squeeze(-1)
    for place, row in enumerate(kept.tolist()):
        if place < row:
            logits[place] = logits[row]
    return tile[kept], logits[: len(kept)], _of(slopes, kept)
