"""Generation by vLLM inside the trainer's processes; the only importer of vllm."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from prefix_rft.config import ConfigError, VLLMConfig
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.rollout import OnDone, check_call
from prefix_rft.weights import full_weights

_MIB = 2**20


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
        self._dtype = autocast_dtype or model.dtype
        self._vocab_size = vocab_size
        self._stop_token_ids = [i for i in eos_token_ids if i < vocab_size]
        self._bucket_bytes = config.weight_bucket_mib * _MIB
        self._can_sleep = device.type == "cuda" if config.sleep is None else config.sleep
        self._is_asleep = False
        # The CPU head packs its weight when it is loaded: a tied one would stay as it was.
        self._unties = device.type != "cuda"
        if not self._stop_token_ids:
            raise ValueError(f"eos_token_ids: expected an id below {vocab_size}, got none")
        if self._can_sleep and device.type != "cuda":
            raise ConfigError("vllm.sleep: expected false, only CUDA memory can be given up")
        if self._dtype == torch.float64:
            raise ConfigError("model.dtype: vLLM has no float64; rollout.engine transformers has")
        if device.index and "LOCAL_RANK" not in os.environ:
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
        self._vllm = _import_vllm()
        self._peers: dist.ProcessGroup | None = None  # who generates the same requests
        if config.tensor_parallel_size > 1:
            self._peers, _ = dist.new_subgroups(config.tensor_parallel_size, backend="gloo")
        self._starts_world = not dist.is_initialized()
        if self._starts_world:  # else vLLM does, for CUDA only, and checkpoints need the CPU too
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
        self._max_length = min(max_length, limit)
        with TemporaryDirectory() as folder:
            _write_config(model, Path(folder), vocab_size=vocab_size, unties=self._unties)
            try:
                self._llm = self._vllm.LLM(
                    folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # no sampling defaults from anywhere
                    dtype=self._dtype,
                    logprobs_mode="processed_logprobs",
                    enable_prefix_caching=True,
                    max_model_len=self._max_length,
                    max_num_seqs=max_batch_sequences,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    kv_cache_memory_bytes=config.kv_cache_mib and config.kv_cache_mib * _MIB,
                    enforce_eager=config.enforce_eager,
                    **_whole_prompts(self._max_length, device),
                    enable_sleep_mode=self._can_sleep,
                    tensor_parallel_size=config.tensor_parallel_size,
                    distributed_executor_backend="external_launcher" if num_ranks > 1 else "uni",
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
        own = [
            _Job(list(r.prompt_ids + r.prefix_ids), r.max_new_tokens, request_seed(seed, i))
            for i, r in enumerate(requests)
        ]
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

    def _run(self, jobs: list["_Job"], temperature: float) -> Iterator[tuple[int, Completion]]:
        """The index of each job and its completion, in the order in which they end."""
        ids = self._llm.enqueue(
            [{"prompt_token_ids": job.token_ids} for job in jobs],
            [
                self._vllm.SamplingParams(
                    temperature=temperature,
                    top_p=1.0,
                    top_k=0,  # off
                    max_tokens=job.max_new_tokens,
                    seed=job.seed,
                    stop_token_ids=self._stop_token_ids,
                    ignore_eos=True,  # those of the model's configuration: ours are complete
                    logprobs=0,  # of the sampled token alone
                    flat_logprobs=True,
                    detokenize=False,
                )
                for job in jobs
            ],
            use_tqdm=False,
        )
        first = int(ids[0].partition("-")[0])  # requests are numbered; a random suffix follows
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                if output.finished:
                    yield int(output.request_id) - first, _completion(output.outputs[0])

    def _with_peers(self, own: list["_Job"]) -> tuple[list["_Job"], int]:
        """The jobs of all ranks that share the weights, in order of rank, and where ours start."""
        if self._peers is None:
            return own, 0
        shares: list[list[_Job]] = [[]] * dist.get_world_size(self._peers)
        dist.all_gather_object(shares, own, group=self._peers)
        start = sum(map(len, shares[: dist.get_rank(self._peers)]))
        return [job for share in shares for job in share], start


class _Job(NamedTuple):
    token_ids: list[int]
    max_new_tokens: int
    seed: int


def _whole_prompts(max_length: int, device: torch.device) -> dict[str, int | bool]:
    """On a CPU no prompt is read in parts: after each vLLM rewinds the generator of a seeded
    request, which one of the CPU cannot do.
    """
    if device.type == "cuda":
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_length, 4096)}


def request_seed(seed: int, index: int) -> int:
    """Of request `index` of a call with `seed`, in [0, 2**63)."""
    digest = hashlib.sha256(f"{seed},{index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _completion(output: object) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion by {output.finish_reason!r}")
    return Completion(
        token_ids=tuple(output.token_ids),
        log_probs=tuple(output.logprobs.logprobs),
        finish_reason=output.finish_reason,
    )


def _write_config(model: PreTrainedModel, folder: Path, *, vocab_size: int, unties: bool) -> None:
    """config.json as vLLM needs it: the trainer's overrides in it, the padded columns not."""
    model.config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    text_values = values.get("text_config", values)
    text_values["vocab_size"] = vocab_size
    # The head's GEMM writes float32, as the trainer's does: bfloat16 logits cost 0.03 in log-prob.
    text_values["head_dtype"] = "float32"
    if unties:
        values["tie_word_embeddings"] = text_values["tie_word_embeddings"] = False
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)].__name__]
    file.write_text(json.dumps(values))


def _import_vllm() -> ModuleType:
    if find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: vllm is not installed; pip install 'prefix-rft[vllm]', "
            "or choose transformers"
        )
    # Its scheduler in a process of its own could not be handed tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Bound to cores, its threads would hold the trainer's there too.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return import_module("vllm")
