"""Counts that cross the ranks of a process group."""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """Sums of counts over the ranks of a process group, in place; nothing is read on the host."""

    group: dist.ProcessGroup

    def add(self, counts: Tensor) -> None:
        dist.all_reduce(counts, group=self.group)

    def add_and_rank(self, counts: Tensor) -> Tensor:
        """Also returns the sum over the ranks before this one."""
        world_size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        rows = counts.new_empty(world_size, len(counts))
        dist.all_gather_into_tensor(rows.view(-1), counts, group=self.group)
        counts.copy_(rows.sum(0))
        return rows[:rank].sum(0)
