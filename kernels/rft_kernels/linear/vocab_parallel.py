"""A head whose classes are sharded over ranks; hidden states and tokens are on all of them (E11).

T rows. Across ranks go four numbers a row with statistics, one gathering of the shards' sizes where
no DTensor tells them, and, where hidden states need it, their gradient.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from .._bundle import flatten
from ..rows import RowStats, Slopes, at, new_stats, row_backend
from . import ops
from .passes import grad_pass, stats_pass
from .tiles import Head, Projection, make_head, write_rows

_LOWEST_SHIFT = -1e4  # e^x is 0 long before, in float64 too, so that 0 * log 0 is 0


class Shard(NamedTuple):
    """Which of the classes this rank has."""

    group: dist.ProcessGroup
    offset: int  # classes of the ranks before this one
    largest: int  # classes of the largest shard
    num_classes: int  # over all ranks


@dataclass(frozen=True)
class ShardedHead(Head):
    """Weight, bias and targets are those of this rank; saved are maximum and sum of all classes."""

    shard: Shard

    def new_stats(self) -> RowStats:
        return new_stats(self.hidden, len(self.hidden), 2)

    def stats(self, tile: Tensor, logits: Tensor, valid: Tensor, out: RowStats) -> None:
        t, marked = at(self.temperature, tile), valid[tile]
        own_maximum, own_log_total, own_entropy = self._own_stats(tile, logits, marked)
        maximum = own_maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, self.shard.group)
        shift = (own_maximum - maximum) / t
        total = own_log_total.exp() * shift.exp()
        weighted = total * (own_log_total - own_entropy + shift.clamp(min=_LOWEST_SHIFT))
        sums = torch.stack([total, weighted, self._at_target(tile, logits, maximum)])
        dist.all_reduce(sums, group=self.shard.group)
        total, weighted, at_target = sums.unbind()
        log_total = total.log()
        entropy = (log_total - weighted / total).clamp(min=0)
        saved = torch.stack([maximum, total], -1)
        found = (at_target - log_total, entropy, maximum / t + log_total, saved)
        found = (torch.where(marked if x.dim() == 1 else marked[:, None], x, 0) for x in found)
        write_rows(out, tile, RowStats(*found))

    def _own_stats(self, tile: Tensor, logits: Tensor, marked: Tensor) -> tuple[Tensor, ...]:
        """Of this rank's classes: the largest logit, log sum e^(z - largest), and the entropy."""
        if logits.shape[1] == 0:
            nothing = logits.new_zeros(len(tile))
            return nothing - torch.inf, nothing, nothing
        largest, column = logits.max(-1)
        found = row_backend(self.backend).row_stats(
            logits, column, marked, at(self.temperature, tile), self.softcap, self.scratch_bytes
        )
        some = largest > -torch.inf
        return (
            self._capped(largest),
            torch.where(some, -found.log_probs, 0),
            torch.where(some, found.entropy, 0),
        )

    def _at_target(self, tile: Tensor, logits: Tensor, maximum: Tensor) -> Tensor:
        """z_y - max z on the rank that has the target, 0 on the others."""
        targets = self.targets[tile]
        owned = (targets >= 0) & (targets < logits.shape[1])
        if logits.shape[1] == 0:
            return torch.zeros_like(maximum)
        x = logits.gather(-1, torch.where(owned, targets, 0).long()[:, None]).squeeze(-1)
        return torch.where(owned, (self._capped(x) - maximum) / at(self.temperature, tile), 0)

    def _capped(self, x: Tensor) -> Tensor:
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def grad(
        self, tile: Tensor, logits: Tensor, entropy: Tensor, saved: Tensor, slopes: Slopes
    ) -> Tensor:
        return super().grad(tile, logits, entropy, saved, slopes) if logits.shape[1] else logits

    def all_reduce(self, dhidden: Tensor) -> None:
        dist.all_reduce(dhidden, group=self.shard.group)


def make_sharded_head(shard: Shard, given: Projection) -> ShardedHead:
    """As `make_head`, the tiles being those of the largest shard, so that all ranks keep step."""
    own = max(0, min(len(given.weight), given.vocab_size - shard.offset))
    local = given._replace(targets=given.targets - shard.offset, vocab_size=own)
    head = make_head(local, widest=min(shard.largest, given.vocab_size))
    return ShardedHead(**vars(head), shard=shard)


class _TokenStats(torch.autograd.Function):
    """`ops.token_stats`; the shard comes last."""

    @staticmethod
    def forward(*arguments):
        *flat, shard = arguments
        projection, rows, _ = ops.token_stats.bundle(flat)
        return stats_pass(make_sharded_head(shard, projection), rows)[:-1]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *flat, ctx.shard = inputs
        ops.setup_context(ctx, flat, output)

    @staticmethod
    def backward(ctx, *doutputs):
        def gradient(projection, *arguments):
            return grad_pass(make_sharded_head(ctx.shard, projection), *arguments)

        return *ops.backward(ctx, *doutputs, gradient=gradient), None


def token_stats(shard: Shard, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.token_stats` over ranks."""
    return _TokenStats.apply(*flatten(arguments), shard)


@torch.no_grad()
def policy(shard: Shard, projection: Projection, *arguments) -> tuple[Tensor, ...]:
    """`ops.policy` over ranks."""
    return ops.policy_of(make_sharded_head(shard, projection), *arguments)


def own_shard(
    weight: Tensor, others: dict[str, Tensor | None], group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor | None], Shard]:
    """This rank's rows of the weight and of what is sharded beside it, and which rows they are.

    Args:
        weight: DTensor [V, D] placed Shard(0) on a mesh of one dimension; or with `group` the plain
            rows [V_r, D] of this rank, ranks in order.
        others: the same by name, in the same form: bias, low-rank weight.
    Raises:
        ValueError: another placement, or DTensors mixed with plain tensors.
    """
    given = {"lm_head_weight": weight} | {k: x for k, x in others.items() if x is not None}
    for name, x in given.items():
        if isinstance(x, DTensor) != (group is None):
            raise ValueError(
                f"{name} must be a DTensor as lm_head_weight is, without process_group, or a plain "
                f"shard with it, got {type(x).__name__}"
            )
        if group is None and (x.device_mesh.ndim != 1 or not x.placements[0].is_shard(0)):
            raise ValueError(
                f"{name} must be placed Shard(0) on a mesh of one dimension, got {x.placements} on "
                f"{x.device_mesh}"
            )
    if group is not None:
        sizes = weight.new_empty(group.size(), dtype=torch.int64)
        own = torch.full((1,), len(weight), device=weight.device)
        dist.all_gather_into_tensor(sizes, own, group)
        sizes = sizes.tolist()
    else:
        group = weight.device_mesh.get_group()
        bounds = [-(-len(weight) // group.size()) * i for i in range(group.size() + 1)]
        ends = [min(bound, len(weight)) for bound in bounds]
        sizes = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    rank = group.rank()
    shard = Shard(group, sum(sizes[:rank]), max(sizes), sum(sizes))
    placed = (ShardPlacement(0),)
    local = {
        name: x.to_local(grad_placements=placed) if isinstance(x, DTensor) else x
        for name, x in given.items()
    }
    return local["lm_head_weight"], [local.get(name) for name in others], shard
