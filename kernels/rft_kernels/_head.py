"""A projection to logits, a tile of rows at a time, and the sums of its gradients.

T rows, V classes, D hidden size. One buffer of `[tile_rows, V]` serves all tiles.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, _check
from .token_stats import check_rows
from .torch_backend import at, default_scratch, row_bytes, stats_dtype

# Enough rows that reading and writing dW once a tile is small beside the tile's GEMMs.
_TILE_ROWS = {"cpu": 256, "cuda": 2048}


class Head(NamedTuple):
    """One call's projection, and how much of it is done at a time."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D], padding cut off
    bias: Tensor | None  # [V]
    targets: Tensor  # [T]
    temperature: float | Tensor  # or [T]
    softcap: float | None
    backend: str
    tile_rows: int
    scratch_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return stats_dtype(self.hidden.dtype)

    def new_tile(self) -> Tensor:
        """The buffer of all tiles of a call."""
        num_rows = min(self.tile_rows, len(self.hidden))
        return self.hidden.new_empty(num_rows, len(self.weight), dtype=self.dtype)

    def tiles(self, rows: Tensor, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Index vectors of the rows with their logits, in the buffer; softcap still to come."""
        for tile in rows.split(len(buffer)) if len(rows) else ():
            yield tile, self.project(tile, buffer[: len(tile)])

    def project(self, tile: Tensor, out: Tensor) -> Tensor:
        hidden = self.hidden[tile].to(self.dtype)
        for classes, weight in self.pieces():
            torch.mm(hidden, weight.t(), out=out[:, classes])
        return out if self.bias is None else out.add_(self.bias)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the logits: whole if it is so already, else by classes."""
        num_classes, width = self.weight.shape
        size = num_classes
        if self.weight.dtype != self.dtype:
            # Half of the scratch: a piece is let go only when the next one is there.
            size = max(1, self.scratch_bytes // (2 * width * self.dtype.itemsize))
        for start in range(0, num_classes, size):
            classes = slice(start, start + size)
            yield classes, self.weight[classes].to(self.dtype)

    def new_stats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros for log_probs [T], entropy [T] and what the backend saves [T, k]."""
        return _backends.new_stats(self.hidden, len(self.hidden), self.backend)

    def stats(self, tile: Tensor, logits: Tensor, valid: Tensor, out: tuple[Tensor, ...]) -> None:
        """Writes the statistics of a tile into those of all rows."""
        found = _backends.module(self.backend).row_stats(
            logits, self.targets[tile], valid[tile], at(self.temperature, tile), self.softcap,
            self.scratch_bytes,
        )  # fmt: skip
        for into, part in zip(out, found, strict=True):
            into[tile] = part

    def grad(self, tile: Tensor, logits: Tensor, *rows: Tensor | None) -> None:
        """Overwrites logits by their gradient; rows: entropy, saved, dlog_probs, dentropy."""
        _backends.module(self.backend).row_grad(
            logits, logits, self.targets[tile], at(self.temperature, tile), self.softcap,
            *rows, self.scratch_bytes,
        )  # fmt: skip


class Grads:
    """Sums of the gradients over tiles, in the dtype of the statistics; only those asked for."""

    def __init__(self, head: Head, needs: Sequence[bool], num_classes: int) -> None:
        self.head = head
        shapes = (head.hidden.shape, (num_classes, head.hidden.shape[1]), (num_classes,))
        self.hidden, self.weight, self.bias = (
            head.hidden.new_zeros(shape if need else 0, dtype=head.dtype)
            for shape, need in zip(shapes, needs, strict=True)
        )
        self.needs = needs

    def add(self, tile: Tensor, dlogits: Tensor) -> None:
        head, (for_hidden, for_weight, for_bias) = self.head, self.needs
        if for_hidden:
            dhidden = self.hidden.new_zeros(len(tile), head.hidden.shape[1])
            for classes, weight in head.pieces():
                dhidden.addmm_(dlogits[:, classes], weight)
            self.hidden[tile] = dhidden
        if for_weight:
            hidden = head.hidden[tile].to(head.dtype)
            self.weight[: dlogits.shape[1]].addmm_(dlogits.t(), hidden)
        if for_bias:
            self.bias[: dlogits.shape[1]] += dlogits.sum(0)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    workspace_bytes: int,
    backend: str,
) -> Head:
    """Shares the workspace out: a tile of logits, and scratch for the primitive or the weight."""
    dtype = stats_dtype(hidden.dtype)
    scratch = min(default_scratch(hidden.device), workspace_bytes // 4)
    scratch = max(scratch, row_bytes(vocab_size, dtype))
    most = _TILE_ROWS.get(hidden.device.type, _TILE_ROWS["cuda"])
    return Head(
        hidden=hidden,
        weight=weight[:vocab_size],
        bias=None if bias is None else bias[:vocab_size],
        targets=targets,
        temperature=temperature if row_temperature is None else row_temperature,
        softcap=softcap,
        backend=backend,
        tile_rows=max(1, min(most, (workspace_bytes - scratch) // (vocab_size * dtype.itemsize))),
        scratch_bytes=scratch,
    )


def split_rows(
    valid: Tensor, active: Tensor, active_rows: Tensor | None, only_active: bool
) -> tuple[Tensor, Tensor]:
    """Indices of the rows that may have a gradient, and of the others with statistics.

    On a device their number must come from the host: from `active_rows`, or it is all of them.
    """
    if valid.device.type == "cpu":
        return active.nonzero().squeeze(-1), (valid & ~active).nonzero().squeeze(-1)
    if active_rows is None:
        every = torch.arange(len(valid), device=valid.device)
        return every, every[:0]
    listed = torch.zeros_like(valid, dtype=torch.int32).index_fill(0, active_rows, 1)
    num_others = 0 if only_active else len(valid) - len(active_rows)
    return active_rows, listed.argsort(stable=True)[:num_others]


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    workspace_bytes: int,
    backend: str,
    row_mask: Tensor | None,
) -> tuple[tuple, Tensor]:
    """Checks and flattens the arguments of make_head; and the rows [T] that have an output."""
    _check.tensor("hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError("hidden must be [..., D], got a 0-dim tensor")
    shape, width = hidden.shape[:-1], hidden.shape[-1]
    _check.tensor("lm_head_weight", weight, dtypes=(hidden.dtype,), like=hidden)
    if weight.dim() != 2 or weight.shape[1] != width or len(weight) == 0:
        raise ValueError(
            f"lm_head_weight must be [V, {width}] with V at least 1, got {list(weight.shape)}"
        )
    if bias is not None:
        _check.tensor("bias", bias, dtypes=(hidden.dtype,), shape=weight.shape[:1], like=hidden)
    if vocab_size is None:
        vocab_size = len(weight)
    _check.integer("vocab_size", vocab_size, least=1, most=len(weight))
    _check.integer("workspace_bytes", workspace_bytes, least=1)
    if softcap is not None:
        _check.number("softcap", softcap, above=0)
    valid = check_rows(hidden, shape, targets, temperature, row_mask, vocab_size)
    per_row = isinstance(temperature, Tensor)
    return (
        hidden.reshape(-1, width),
        weight,
        bias,
        targets.reshape(-1),
        temperature.detach().reshape(-1) if per_row else None,
        1.0 if per_row else float(temperature),
        None if softcap is None else float(softcap),
        vocab_size,
        workspace_bytes,
        _backends.resolve(backend, hidden.device),
    ), valid.reshape(-1)
