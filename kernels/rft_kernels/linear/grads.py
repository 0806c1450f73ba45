"""The sums of a projection's gradients over its tiles (E9)."""

from collections.abc import Sequence

from torch import Tensor

from . import gemm
from .tiles import Head


class Grads:
    """Sums of the gradients over tiles, in the dtype of the statistics; only those asked for."""

    def __init__(self, head: Head, needs: Sequence[bool], dweight: Tensor | None = None) -> None:
        """`dweight`: the gradient of the weight is added to it, and is not among the results."""
        hidden, num_classes = head.hidden, head.num_classes
        shapes = [hidden.shape, (num_classes, head.weight.shape[1]), (0,), (num_classes,)]
        if head.low_rank is not None:
            shapes[2] = (num_classes, head.low_rank.shape[1])
        # The weight's, by far the largest, is written by the first tile.
        wanted = wanted_results(needs, dweight)
        new = (hidden.new_zeros, hidden.new_empty, hidden.new_zeros, hidden.new_zeros)
        self._sums = [
            make(shape if need else 0, dtype=head.dtype)
            for make, shape, need in zip(new, shapes, wanted, strict=True)
        ]
        self._head, self._needs, self._dweight = head, needs, dweight
        self._num_tiles = 0

    def add(self, tile: Tensor, dlogits: Tensor) -> None:
        head, (dhidden, dweight, dlow_rank, dbias) = self._head, self._sums
        hidden, inner = head.parts(head.hidden[tile].to(dlogits.dtype))
        num_classes = len(head.weight)
        for_hidden, for_weight, for_low_rank, for_bias = self._needs
        if for_hidden:
            rows = dhidden.new_zeros(len(tile), dhidden.shape[1])
            drows, dinner = head.parts(rows)
            for classes, weight in head.pieces(dlogits.dtype):
                gemm.addmm(dlogits[:, classes], weight, drows)
            if head.low_rank is not None:
                gemm.addmm(dlogits, head.low_rank.to(dlogits.dtype), dinner)
            dhidden[tile] = rows
        if for_weight and self._dweight is not None:
            gemm.addmm(dlogits.t(), hidden, self._dweight[:num_classes])
        elif for_weight:
            product = gemm.addmm if self._num_tiles else gemm.mm
            product(dlogits.t(), hidden, dweight[:num_classes])
        if for_low_rank:
            gemm.addmm(dlogits.t(), inner, dlow_rank[:num_classes])
        if for_bias:
            dbias[:num_classes] += dlogits.sum(0, dtype=dbias.dtype)
        self._num_tiles += 1

    def finish(self) -> tuple[Tensor, ...]:
        """Gradients of hidden states, weight, low-rank term and bias; empty if not asked for."""
        dhidden, dweight = self._sums[:2]
        dweight[len(self._head.weight) if self._num_tiles else 0 :] = 0
        if self._needs[0]:
            self._head.all_reduce(dhidden)
        return tuple(self._sums)


def wanted_results(needs: Sequence[bool], dweight: Tensor | None) -> list[bool]:
    """Which gradients are results of a pass: the weight's only without a buffer to add it to."""
    for_hidden, for_weight, *others = needs
    return [for_hidden, for_weight and dweight is None, *others]
