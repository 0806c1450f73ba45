"""A projection to logits, a tile of rows at a time (E9).

T rows, V classes, D hidden size, R that of a low-rank term. One buffer of `[tile_rows, V]` serves
all tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..results import stats_dtype
from ..rows import RowStats, Slopes, at, default_scratch, new_stats, row_backend, row_bytes
from . import gemm

# Enough rows that reading and writing dW once a tile is small beside the tile's GEMMs.
_TILE_ROWS = {"cpu": 448, "cuda": 2048}
# Logits from row to row: on a device a multiple of what its GEMMs and loads take at a time.
_ROW_MULTIPLES = {"cpu": 1, "cuda": 64}
_COUNTING_DEVICES = ("cpu",)  # where the number of marked rows may be read


class Projection(NamedTuple):
    """What every op from hidden states is given; those that may have a gradient come first."""

    hidden: Tensor  # [T, D + R]
    weight: Tensor  # [V, D]
    low_rank: Tensor | None  # [V, R]: beside the weight, without being one matrix with it
    bias: Tensor | None  # [V]
    targets: Tensor  # [T]
    row_temperature: Tensor | None  # [T]
    temperature: float  # where there is none a row
    softcap: float | None
    vocab_size: int  # columns from here on are padding
    workspace_bytes: int
    backend: str


DIFFERENTIABLE = Projection._fields[:4]


class Rows(NamedTuple):
    """Which rows an op works on."""

    valid: Tensor  # [T] bool, those with statistics
    active: Tensor  # [T] bool, those that may have a gradient
    listed: Tensor | None  # [N] those outside which there is none, if the caller knows them
    only_active: bool  # the others need no statistics


@dataclass(frozen=True)
class Head:
    """One call's projection, and how much of it is done at a time."""

    hidden: Tensor  # [T, D + R]
    weight: Tensor  # [V, D], padding cut off
    low_rank: Tensor | None  # [V, R]
    bias: Tensor | None  # [V]
    targets: Tensor  # [T]
    temperature: float | Tensor  # or [T]
    softcap: float | None
    backend: str
    num_classes: int  # padding included
    tile_rows: int
    scratch_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return stats_dtype(self.hidden.dtype)

    @property
    def operand_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return gemm.operand_dtypes(self.hidden.dtype, self.dtype, self.hidden.device)

    def parts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What meets the weight, and what meets the low-rank term."""
        width = self.weight.shape[1]
        return hidden[:, :width], hidden[:, width:]

    def new_tile(self) -> Tensor:
        """The buffer of all tiles of a call."""
        return self._new_rows(min(self.tile_rows, len(self.hidden)), self.dtype)

    def _new_rows(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        num_classes = len(self.weight)
        stride = row_stride(num_classes, self.hidden.device)
        return self.hidden.new_empty(num_rows, stride, dtype=dtype)[:, :num_classes]

    def tiles(self, rows: Tensor, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Index vectors of the rows with their logits, in the buffer; softcap still to come.

        Tiles are of one size, or nearly: a small one costs its reads of the weight all the same.
        """
        num_tiles = -(-len(rows) // max(1, len(buffer)))
        for tile in rows.tensor_split(num_tiles) if num_tiles else ():
            yield tile, self.project(tile, buffer[: len(tile)])

    def project(self, tile: Tensor, out: Tensor) -> Tensor:
        dtype, _ = self.operand_dtypes
        hidden, inner = self.parts(self.hidden[tile].to(dtype))
        for classes, weight in self.pieces(dtype):
            gemm.mm(hidden, weight.t(), out[:, classes])
        if self.low_rank is not None:
            gemm.addmm(inner, self.low_rank.t().to(dtype), out)
        return out if self.bias is None else out.add_(self.bias)

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`: whole if it is so already, else by classes."""
        num_classes, width = self.weight.shape
        size = max(1, num_classes)
        if self.weight.dtype != dtype:
            # Half of the scratch: a piece is let go only when the next one is there.
            size = max(1, self.scratch_bytes // (2 * width * dtype.itemsize))
        for start in range(0, num_classes, size):
            classes = slice(start, start + size)
            yield classes, self.weight[classes].to(dtype)

    def new_stats(self) -> RowStats:
        """Zeros."""
        return new_stats(self.hidden, len(self.hidden), row_backend(self.backend).NUM_SAVED)

    def stats(self, tile: Tensor, logits: Tensor, valid: Tensor, out: RowStats) -> None:
        """Writes the statistics of a tile into those of all rows."""
        found = row_backend(self.backend).row_stats(
            logits,
            self.targets[tile],
            valid[tile],
            at(self.temperature, tile),
            self.softcap,
            self.scratch_bytes,
        )
        write_rows(out, tile, found)

    def grad(
        self, tile: Tensor, logits: Tensor, entropy: Tensor, saved: Tensor, slopes: Slopes
    ) -> Tensor:
        """The gradient by logits, over them if in their dtype; all but the head is of the tile."""
        _, dtype = self.operand_dtypes
        out = logits if logits.dtype == dtype else self._new_rows(len(logits), dtype)
        row_backend(self.backend).row_grad(
            out,
            logits,
            self.targets[tile],
            at(self.temperature, tile),
            self.softcap,
            entropy,
            saved,
            slopes,
            self.scratch_bytes,
        )
        return out

    def all_reduce(self, dhidden: Tensor) -> None:
        """Called with the whole gradient of the hidden states."""


def write_rows(out: RowStats, tile: Tensor, found: RowStats) -> None:
    """Writes the statistics of a tile, none of squares, into those of all rows."""
    for into, part in zip(out[:-1], found[:-1], strict=True):
        into[tile] = part


def row_stride(num_classes: int, device: torch.device) -> int:
    """From a row of a tile to the next, in logits: a vocabulary may be of any size."""
    multiple = _ROW_MULTIPLES.get(device.type, _ROW_MULTIPLES["cuda"])
    return -(-num_classes // multiple) * multiple


def make_head(given: Projection, widest: int | None = None) -> Head:
    """Divides the workspace: a tile of logits, and scratch for the primitive or the weight.

    `widest`: classes for which a row of a tile has to have room, if not those of this head.
    """
    device, dtype = given.hidden.device, stats_dtype(given.hidden.dtype)
    _, gradient_dtype = gemm.operand_dtypes(given.hidden.dtype, dtype, device)
    vocab_size = given.vocab_size
    widest = vocab_size if widest is None else widest
    scratch = 0
    if given.backend == "torch" or gradient_dtype != given.hidden.dtype:
        scratch = min(default_scratch(device), given.workspace_bytes // 4)
        scratch = max(scratch, row_bytes(widest, dtype))
    logit_bytes = dtype.itemsize + (0 if gradient_dtype == dtype else gradient_dtype.itemsize)
    tile_rows = (given.workspace_bytes - scratch) // (row_stride(widest, device) * logit_bytes)
    most = _TILE_ROWS.get(device.type, _TILE_ROWS["cuda"])
    per_row = given.row_temperature is not None
    return Head(
        hidden=given.hidden,
        weight=given.weight[:vocab_size],
        low_rank=None if given.low_rank is None else given.low_rank[:vocab_size],
        bias=None if given.bias is None else given.bias[:vocab_size],
        targets=given.targets,
        temperature=given.row_temperature if per_row else given.temperature,
        softcap=given.softcap,
        backend=given.backend,
        num_classes=len(given.weight),
        tile_rows=max(1, min(most, tile_rows)),
        scratch_bytes=scratch,
    )


def counts_rows(device: torch.device) -> bool:
    return device.type in _COUNTING_DEVICES


def split_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """Indices of the rows that may have a gradient, and of the others with statistics.

    On a device their number must come from the host: from `listed`, or it is all of them.
    """
    valid, active, listed, only_active = rows
    if counts_rows(valid.device):
        return active.nonzero().squeeze(-1), (valid & ~active).nonzero().squeeze(-1)
    if listed is None:
        every = torch.arange(len(valid), device=valid.device)
        return every, every[:0]
    marked = torch.zeros_like(valid, dtype=torch.int32).index_fill(0, listed, 1)
    num_others = 0 if only_active else len(valid) - len(listed)
    return listed, marked.argsort(stable=True)[:num_others]
