"""The processes of a run: who they are, what they tell each other, and how they share a model."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from prefix_rft.checks import ConfigError, UserError
from prefix_rft.config import ShardingConfig

T = TypeVar("T")
_GLOO = "gloo"  # in the text of its errors, which have no class of their own


class LostRankError(UserError):
    """A rank cannot reach the others any more."""


class World:
    """The ranks of a run. A process that torchrun did not start is a world of its own.

    What every rank must do in the same order, since it waits for the others, is marked Collective.

    Args:
        sharding: the section `[sharding]`.
        device: of the model; each rank of a machine takes a CUDA device of its own.
    Raises:
        ConfigError: the ranks cannot be divided as asked, or are all to take one CUDA device.
    """

    def __init__(
        self, sharding: ShardingConfig | None = None, device: torch.device | None = None
    ) -> None:
        sharding = ShardingConfig() if sharding is None else sharding
        device = torch.device("cpu") if device is None else device
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0
        self.mesh: DeviceMesh | None = None  # None: one process, nothing sharded
        if self.size % sharding.replicas:
            raise ConfigError(
                f"sharding.replicas: expected a divisor of the {self.size} processes, "
                f"got {sharding.replicas}"
            )
        if self.size > 1 and device.index is not None:
            raise ConfigError(
                f"model.device: expected auto, cuda or cpu for {self.size} processes, got {device}"
            )
        if device.type == "cuda":  # also one's own: vLLM's sender takes the current one
            torch.cuda.set_device(self.local_rank if device.index is None else device.index)
        if self.size == 1 and not sharding.cpu_offload:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=sharding.timeout_s)
        if self.size == 1 and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
        shape = (sharding.replicas, self.size // sharding.replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.mesh = mesh if sharding.replicas > 1 else mesh["shard"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: object) -> None:
        """Collective at the end of a run that went well; else the process just ends."""
        if self.mesh is not None and error is None:
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _GLOO in str(error)
        ):
            reason = str(error).strip().splitlines()[0]
            raise LostRankError(
                f"rank {self.rank}: another rank is gone, or silent for longer than "
                f"sharding.timeout_s ({reason}); the last checkpoint is whole: --resume"
            ) from error

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`: every size-th."""
        return items[self.rank :: self.size]

    def all_gather(self, shard: Sequence[T]) -> list[T]:
        """All items, in order, from each rank's shard of them. Collective."""
        shards = self.all_gather_object(list(shard))
        items: list[Any] = [None] * sum(map(len, shards))
        for rank, part in enumerate(shards):
            items[rank :: self.size] = part
        return items

    def all_gather_object(self, item: T) -> list[T]:
        """Every rank's `item`, in order of rank. Collective."""
        items = [item]
        if self.size > 1:
            items *= self.size
            dist.all_gather_object(items, item)
        return items

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Overwrites each tensor by its sum over the ranks. Collective."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, or the UserError that it raises there. Collective."""
        outcome = [attempt(function) if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


def attempt(function: Callable[[], T]) -> T | UserError:
    """What `function` returns, or the UserError that it raises."""
    try:
        return function()
    except UserError as error:
        return error


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_module(
    model: nn.Module,
    parts: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None,
    cpu_offload: bool,
) -> None:
    """Shard `parts`, and what is left of `model`, over the ranks of `mesh` (FSDP2).

    Gradients are summed over ranks, in float32 at least: a loss is normalised by its caller.

    Args:
        parts: submodules to be gathered one at a time.
        mesh: [ranks], or [replicas, ranks that share one copy].
        param_dtype: of forward and backward; None: the parameters' own.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,  # log-probs of 16 bits would be off by more than a clip range
    )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for module in (*parts, model):
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """`model` with all its weights on every rank, for forwards without gradient. Collective."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not shards[0], recurse=False)
