"""Generation with vLLM inside the trainer's processes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from prefix_rft.checks import ConfigError
from prefix_rft.config import VLLMConfig
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.model import full_weights
from prefix_rft.rollout.engine import OnDone
from prefix_rft.rollout.vllm_base import VLLMBase
from prefix_rft.rollout.vllm_options import (
    engine_options,
    import_vllm,
    request_seed,
    sampling_options,
    write_model_config,
)

_Job = tuple[RolloutRequest, int]  # what to generate, and the seed of its own random stream


class VLLMEngine(VLLMBase):
    """vLLM in each process of the trainer, on the trainer's own device.

    Every process generates for itself or, with a tensor-parallel size of n, in a group of n
    neighbouring ranks that share one copy of the weights. Arguments as in `VLLMBase`.
    """

    def _start(
        self, config: VLLMConfig, device: torch.device, model_config: PreTrainedConfig
    ) -> None:
        self.is_collective = config.tensor_parallel_size > 1
        self._can_sleep = device.type == "cuda" if config.sleep is None else config.sleep
        self._is_asleep = False
        if self._can_sleep and device.type != "cuda":
            raise ConfigError("vllm.sleep: expected false, since only CUDA memory can be freed")
        if device.index:  # only a single process may name an index
            raise ConfigError(
                "model.device: vLLM uses the first visible device; select it with "
                f"CUDA_VISIBLE_DEVICES, got {device}"
            )
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks % config.tensor_parallel_size:
            raise ConfigError(
                f"vllm.tensor_parallel_size: expected a divisor of the {num_ranks} processes, "
                f"got {config.tensor_parallel_size}"
            )
        # Tensors cannot be passed to a scheduler that runs in a process of its own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._vllm = import_vllm()
        self._peers: dist.ProcessGroup | None = None  # ranks that generate the same requests
        if config.tensor_parallel_size > 1:
            self._peers, _ = dist.new_subgroups(config.tensor_parallel_size, backend="gloo")
        self._starts_world = not dist.is_initialized()
        if self._starts_world:  # vLLM would create it for CUDA only; checkpoints need the CPU too
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        options = engine_options(
            config,
            device=device,
            dtype=self._weight_options["dtype"],
            max_length=self._max_length,
            max_batch_sequences=self._max_batch_sequences,
        )
        with TemporaryDirectory() as folder:
            write_model_config(
                model_config,
                Path(folder),
                vocab_size=self._weight_options["vocab_size"],
                unties=self._weight_options["unties"],
            )
            try:
                self._llm = self._vllm.LLM(
                    folder,
                    enable_sleep_mode=self._can_sleep,
                    distributed_executor_backend="external_launcher" if num_ranks > 1 else "uni",
                    **options,
                )
            except ValueError as error:
                raise ConfigError(f"vllm: {error}") from error

    @torch.no_grad()
    def update_weights(self, model: nn.Module, version: int) -> None:
        """Copy the weights of `model` to vLLM, one bucket at a time. Collective.

        Raises:
            ConfigError: vLLM expects other weights for this model.
        """
        self.weights_version = None
        if self._is_asleep:
            torch.cuda.empty_cache()  # vLLM cannot use the blocks that torch keeps cached
            self._llm.wake_up(["weights"])
        weights = full_weights(model, bucket_bytes=self._bucket_bytes, **self._weight_options)
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"rollout.engine: vLLM does not accept the weights of {type(model).__name__}; "
                f"use transformers ({error})"
            ) from error
        if self._is_asleep:
            self._llm.wake_up(["kv_cache"])
            self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it has unfinished requests")
        self.weights_version = version

    def sleep(self) -> None:
        """Free weights and KV cache until the next `update_weights`, if `vllm.sleep` allows it."""
        if self._can_sleep and not self._is_asleep:
            self.weights_version = None  # sleeping discards them
            self._is_asleep = True
            self._llm.sleep(level=2)

    def close(self) -> None:
        """Destroy vLLM's process groups while those of the trainer, which they use, still exist."""
        if self._starts_world:
            self._llm.llm_engine.engine_core.shutdown()
        else:
            self._vllm.distributed.destroy_model_parallel()
            self._vllm.distributed.get_world_group().destroy()

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        seed: int,
        weights_version: int,
        top_p: float = 1.0,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`; collective with tensor parallelism.

        Every request has its own random stream, seeded by `seed` and its index. Log-probs that are
        not finite are returned as vLLM computed them.

        Raises:
            RuntimeError: also after an interrupted call.
        """
        self._check(requests, temperature, weights_version)
        if self._llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("an interrupted generate left requests behind: create a new engine")
        own = [(request, request_seed(seed, i)) for i, request in enumerate(requests)]
        jobs, start = self._with_peers(own)
        if not jobs:
            return []
        completions: dict[int, Completion] = {}
        for index, completion in self._run(jobs, temperature, top_p):
            if 0 <= index - start < len(own):
                completions[index - start] = completion
                if on_done is not None:
                    on_done(index - start, completion)
        return [completions[i] for i in range(len(own))]

    def _run(
        self, jobs: list[_Job], temperature: float, top_p: float
    ) -> Iterator[tuple[int, Completion]]:
        """The index of each job and its completion, in the order they finish."""
        ids = self._llm.enqueue(
            [{"prompt_token_ids": list(r.prompt_ids + r.prefix_ids)} for r, _ in jobs],
            [
                self._vllm.SamplingParams(
                    **sampling_options(
                        request,
                        temperature=temperature,
                        top_p=top_p,
                        seed=seed,
                        stop_token_ids=self._stop_token_ids,
                    ),
                    flat_logprobs=True,
                )
                for request, seed in jobs
            ],
            use_tqdm=False,
        )
        first = int(ids[0].partition("-")[0])  # requests are numbered; a random suffix follows
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                if output.finished:
                    yield int(output.request_id) - first, self._cut(_completion(output.outputs[0]))

    def _with_peers(self, own: list[_Job]) -> tuple[list[_Job], int]:
        """The jobs of all ranks that share the weights, by rank, and the index of our first."""
        if self._peers is None:
            return own, 0
        by_rank: list[list[_Job]] = [[]] * dist.get_world_size(self._peers)
        dist.all_gather_object(by_rank, own, group=self._peers)
        start = sum(map(len, by_rank[: dist.get_rank(self._peers)]))
        return [job for jobs in by_rank for job in jobs], start


def _completion(output: object) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with {output.finish_reason!r}")
    return Completion(
        token_ids=tuple(output.token_ids),
        log_probs=tuple(output.logprobs.logprobs),
        finish_reason=output.finish_reason,
    )
