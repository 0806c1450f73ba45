"""Generation by vLLM inside the trainer's processes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from prefix_rft.checks import ConfigError
from prefix_rft.config import VLLMConfig
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.model import full_weights
from prefix_rft.rollout.engine import OnDone, check_call
from prefix_rft.rollout.vllm_options import (
    engine_options,
    import_vllm,
    request_seed,
    sampling_options,
    sequence_limit,
    stop_token_ids,
    unties_weights,
    weight_dtype,
    write_model_config,
)

_MIB = 2**20
_Job = tuple[RolloutRequest, int]  # what to generate, and the seed of its random stream


class VLLMEngine:
    """A `RolloutEngine` of vLLM, one per process, whose weights are pushed to it.

    The processes that torchrun starts generate for themselves, or, with a tensor parallel size of
    n, in groups of n neighbours that share one copy of the weights.

    Args:
        model: a causal language model of transformers, possibly sharded; only its configuration is
            read here: the engine holds no weights before the first `update_weights`.
        config: the section `[vllm]`.
        device: of the compute, which is vLLM's choice too.
        max_length: tokens of a sequence, at most; the model's own limit is kept.
        eos_token_ids: each of them ends a completion.
        vocab_size: tokens of the tokenizer; the engine's model ends there, so that ids past it can
            neither be sampled nor take part in the softmax.
        max_batch_sequences: sequences generated at once.
        autocast_dtype: of weights and forward; None: the weights' dtype.
    Raises:
        ConfigError: vLLM is not installed, or cannot run the model as asked.
        ValueError: no end-of-sequence token below `vocab_size`.
    """

    shares_module = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: VLLMConfig,
        device: torch.device,
        max_length: int,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_batch_sequences: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.is_collective = config.tensor_parallel_size > 1
        self.weights_version: int | None = None
        self._dtype = weight_dtype(autocast_dtype or model.dtype)
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids(eos_token_ids, vocab_size)
        self._bucket_bytes = config.weight_bucket_mib * _MIB
        self._can_sleep = device.type == "cuda" if config.sleep is None else config.sleep
        self._is_asleep = False
        self._unties = unties_weights(device)
        if self._can_sleep and device.type != "cuda":
            raise ConfigError("vllm.sleep: expected false, only CUDA memory can be given up")
        if device.index:  # never that of one among several processes
            raise ConfigError(
                "model.device: vLLM takes the first visible device; choose it by "
                f"CUDA_VISIBLE_DEVICES, got {device}"
            )
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks % config.tensor_parallel_size:
            raise ConfigError(
                f"vllm.tensor_parallel_size: expected a divisor of the {num_ranks} processes, "
                f"got {config.tensor_parallel_size}"
            )
        # Its scheduler in a process of its own could not be handed tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._vllm = import_vllm()
        self._peers: dist.ProcessGroup | None = None  # who generates the same requests
        if config.tensor_parallel_size > 1:
            self._peers, _ = dist.new_subgroups(config.tensor_parallel_size, backend="gloo")
        self._starts_world = not dist.is_initialized()
        if self._starts_world:  # else vLLM does, for CUDA only, and checkpoints need the CPU too
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._max_length = sequence_limit(model.config, max_length)
        options = engine_options(
            config,
            device=device,
            dtype=self._dtype,
            max_length=self._max_length,
            max_batch_sequences=max_batch_sequences,
        )
        with TemporaryDirectory() as folder:
            write_model_config(
                model.config, Path(folder), vocab_size=vocab_size, unties=self._unties
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
        """Copy the weights of `model`, a bucket at a time. Collective.

        Raises:
            ConfigError: vLLM knows the model by other weights.
        """
        self.weights_version = None
        if self._is_asleep:
            torch.cuda.empty_cache()  # blocks that the update has left are not vLLM's to take
            self._llm.wake_up(["weights"])
        weights = full_weights(
            model,
            dtype=self._dtype,
            bucket_bytes=self._bucket_bytes,
            vocab_size=self._vocab_size,
            unties=self._unties,
        )
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"rollout.engine: vLLM does not take the weights of {type(model).__name__}; "
                f"transformers does ({error})"
            ) from error
        if self._is_asleep:
            self._llm.wake_up(["kv_cache"])
            self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: it holds unfinished requests")
        self.weights_version = version

    def sleep(self) -> None:
        """Give up weights and KV cache until the next `update_weights`, by `vllm.sleep`."""
        if self._can_sleep and not self._is_asleep:
            self.weights_version = None  # what would be generated now comes from garbage
            self._is_asleep = True
            self._llm.sleep(level=2)

    def close(self) -> None:
        """End vLLM's process groups while those of the trainer still live, with which it began."""
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
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per request, in order; collective with tensor parallelism.

        Every request has a random stream of its own, by `seed` and its index. Log-probs are as vLLM
        computed them, also where they are not finite.

        Raises:
            RuntimeError: `weights_version` is not the engine's, or an earlier call was interrupted.
            ValueError: a request without tokens, with no budget, or too long.
        """
        check_call(
            requests,
            temperature=temperature,
            asked_version=weights_version,
            version=self.weights_version,
            max_length=self._max_length,
            max_length_source="data.max_prompt_tokens + max_response_length, or the model's own",
        )
        if self._llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("an interrupted generate left requests: make a new engine")
        own = [(request, request_seed(seed, i)) for i, request in enumerate(requests)]
        jobs, start = self._with_peers(own)
        if not jobs:
            return []
        completions: dict[int, Completion] = {}
        for index, completion in self._run(jobs, temperature):
            if 0 <= index - start < len(own):
                completions[index - start] = completion
                if on_done is not None:
                    on_done(index - start, completion)
        return [completions[i] for i in range(len(own))]

    def _run(self, jobs: list[_Job], temperature: float) -> Iterator[tuple[int, Completion]]:
        """The index of each job and its completion, in the order in which they end."""
        ids = self._llm.enqueue(
            [{"prompt_token_ids": list(r.prompt_ids + r.prefix_ids)} for r, _ in jobs],
            [
                self._vllm.SamplingParams(
                    **sampling_options(
                        request,
                        temperature=temperature,
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
                    yield int(output.request_id) - first, _completion(output.outputs[0])

    def _with_peers(self, own: list[_Job]) -> tuple[list[_Job], int]:
        """The jobs of all ranks that share the weights, in order of rank, and where ours start."""
        if self._peers is None:
            return own, 0
        shares: list[list[_Job]] = [[]] * dist.get_world_size(self._peers)
        dist.all_gather_object(shares, own, group=self._peers)
        start = sum(map(len, shares[: dist.get_rank(self._peers)]))
        return [job for share in shares for job in share], start


def _completion(output: object) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion by {output.finish_reason!r}")
    return Completion(
        token_ids=tuple(output.token_ids),
        log_probs=tuple(output.logprobs.logprobs),
        finish_reason=output.finish_reason,
    )
