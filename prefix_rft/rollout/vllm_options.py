"""How vLLM is configured, in process or as a server: its model, its options, its sampling."""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from prefix_rft.checks import ConfigError
from prefix_rft.config import VLLMConfig, require_package
from prefix_rft.data_types import RolloutRequest

_MIB = 2**20
_SET_ELSEWHERE = {"model", "tokenizer", "seed", "enable_sleep_mode", "distributed_executor_backend"}
_CHANGES_SAMPLES = {"logits_processors", "override_generation_config", "hf_overrides"}


def import_vllm() -> ModuleType:
    """Import vLLM with less logging, and without pinning the threads of this process to cores.

    Raises:
        ConfigError: it is not installed.
    """
    require_package("vllm", "rollout.engine")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return import_module("vllm")


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`; a ConfigError if vLLM does not support it."""
    if dtype == torch.float64:
        raise ConfigError("model.dtype: vLLM has no float64; use rollout.engine transformers")
    return dtype


def stop_token_ids(eos_token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids the engine's model has: its vocabulary ends at `vocab_size`."""
    ids = [i for i in eos_token_ids if i < vocab_size]
    if not ids:
        raise ValueError(f"eos_token_ids: expected an id below {vocab_size}, got none")
    return ids


def unties_weights(device: torch.device) -> bool:
    """Whether tied weights are pushed under both names.

    On a CPU vLLM repacks the weight of the head when it is loaded: a tied head would keep the old
    one.
    """
    return device.type != "cuda"


def sequence_limit(model_config: PreTrainedConfig, max_length: int) -> int:
    """The longest sequence in tokens: `max_length`, or the model's own limit if that is less."""
    text_config = model_config.get_text_config()
    return min(max_length, getattr(text_config, "max_position_embeddings", max_length))


def engine_options(
    config: VLLMConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    max_batch_sequences: int,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and options of `vllm serve`; None leaves the choice to vLLM.

    Raises:
        ConfigError: `vllm.options` has a name that vLLM does not know or that is set here, or one
            that changes what is sampled from.
    """
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "dtype": str(dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "max_model_len": max_length,
        "max_num_seqs": max_batch_sequences,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_mib and config.kv_cache_mib * _MIB,
        "enforce_eager": config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
    if device.type != "cuda":
        # After each chunk of a prompt vLLM rewinds the generator of a seeded request, which a CPU
        # generator does not support.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_length, 4096)
    _check_further(config.options, set(options))
    return options | config.options


def _check_further(further: dict[str, Any], ours: set[str]) -> None:
    if not further:
        return
    known = {field.name for field in dataclasses.fields(import_vllm().EngineArgs)}
    for name in further:
        key = f"vllm.options.{name}"
        if name in ours | _SET_ELSEWHERE:
            raise ConfigError(f"{key}: it follows from the sections [rollout], [vllm] and [model]")
        if name in _CHANGES_SAMPLES:
            raise ConfigError(f"{key}: it would change what rollouts are sampled from")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}: vLLM has no such engine argument; did you mean {near!r}?")


def write_model_config(
    config: PreTrainedConfig, folder: Path, *, vocab_size: int, unties: bool
) -> None:
    """Write config.json for vLLM, with the trainer's overrides and without the padded columns."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    text_values = values.get("text_config", values)
    text_values["vocab_size"] = vocab_size
    # Like the trainer's, the head's GEMM writes float32: bfloat16 logits cost 0.03 in log-prob.
    values["head_dtype"] = text_values["head_dtype"] = "float32"
    if unties:
        values["tie_word_embeddings"] = text_values["tie_word_embeddings"] = False
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    file.write_text(json.dumps(values))


def sampling_options(
    request: RolloutRequest,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    stop_token_ids: list[int],
) -> dict[str, Any]:
    """Fields of `vllm.SamplingParams`: samples come from the softmax that is trained."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0,  # off
        "max_tokens": request.max_new_tokens,
        "seed": seed,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": True,  # stop_token_ids has them all; the model's configuration may not
        "logprobs": 0,  # only that of the sampled token
        "detokenize": False,
    }


def request_seed(seed: int, index: int) -> int:
    """The seed of request `index` in a call with `seed`, in [0, 2**63)."""
    digest = hashlib.sha256(f"{seed},{index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
