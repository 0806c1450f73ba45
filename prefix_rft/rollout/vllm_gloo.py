"""A backend of vLLM's weight transfer for machines without CUDA, over gloo.

The server's workers import this module for their extension class, which registers the backend.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import (
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

BACKEND = "prefix_rft_gloo"
_TIMEOUT = timedelta(minutes=10)


class WorkerExtension:
    """Adds nothing: a worker that loads it imports this module."""


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    backend: ClassVar[str] = BACKEND


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """The receiver in a worker: weights arrive one by one, in the order announced."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        config = self.parallel_config
        rank = config.data_parallel_index * config.world_size + config.rank
        self.model_update_group = _group(init_info, init_info.rank_offset + rank)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        announced = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in announced:
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(weight, 0).wait()
            self.model.load_weights([(name, weight)])

    def shutdown(self) -> None:
        self.model_update_group = None


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """The sender in rank 0 of the trainer; the other ranks take part in its gathers."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            workers = NCCLWeightTransferInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
            )
            with ThreadPoolExecutor(max_workers=1) as pool:  # workers wait for the sender
                joined = pool.submit(client.init_weight_transfer_engine, asdict(workers))
                engine.model_update_group = _group(init_info, 0)
                joined.result()
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        for _, weight in self._checked_iter(source, meta):
            if self.is_sender:
                self.model_update_group.broadcast(weight.contiguous(), 0).wait()

    def shutdown(self) -> None:
        self.model_update_group = None


def _group(
    info: GlooTrainerInitInfo | NCCLWeightTransferInitInfo, rank: int
) -> dist.ProcessGroupGloo:
    """The process group of the sender, rank 0, and all workers."""
    # As for NCCL: this store listens on the sender's address alone, one of torch's own on all.
    rendezvous = StatelessProcessGroup.create(
        info.master_address,
        info.master_port,
        rank,
        info.world_size,
        store_timeout=int(_TIMEOUT.total_seconds()),
    )
    return dist.ProcessGroupGloo(rendezvous.store, rank, info.world_size, _TIMEOUT)


WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerWeightTransferEngine)
