"""What an engine of vLLM is told, wherever it runs: its model, its options, how to sample."""

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


def import_vllm() -> ModuleType:
    """vLLM, quiet, and on a CPU not bound to cores, where its threads would hold others too.

    Raises:
        ConfigError: it is not installed.
    """
    require_package("vllm", "rollout.engine")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return import_module("vllm")


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`; a ConfigError if vLLM does not have it."""
    if dtype == torch.float64:
        raise ConfigError("model.dtype: vLLM has no float64; rollout.engine transformers has")
    return dtype


def stop_token_ids(eos_token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Those that the engine's model has, whose vocabulary ends at `vocab_size`."""
    ids = [i for i in eos_token_ids if i < vocab_size]
    if not ids:
        raise ValueError(f"eos_token_ids: expected an id below {vocab_size}, got none")
    return ids


def unties_weights(device: torch.device) -> bool:
    """Whether tied weights are pushed under both names.

    vLLM's head on a CPU packs its weight as it is loaded: a tied one would stay as it was.
    """
    return device.type != "cuda"


def sequence_limit(model_config: PreTrainedConfig, max_length: int) -> int:
    """Tokens of a sequence, at most: `max_length`, or fewer by the model's own limit."""
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
    """Arguments of `vllm.LLM`, options of `vllm serve`; None leaves the choice to vLLM."""
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from anywhere
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
        # No prompt is read in parts: after each vLLM rewinds the generator of a seeded request,
        # which one of the CPU cannot do.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_length, 4096)
    return options


def write_model_config(
    config: PreTrainedConfig, folder: Path, *, vocab_size: int, unties: bool
) -> None:
    """config.json as vLLM needs it: the trainer's overrides in it, the padded columns not."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    text_values = values.get("text_config", values)
    text_values["vocab_size"] = vocab_size
    # The head's GEMM writes float32, as the trainer's does: bfloat16 logits cost 0.03 in log-prob.
    values["head_dtype"] = text_values["head_dtype"] = "float32"
    if unties:
        values["tie_word_embeddings"] = text_values["tie_word_embeddings"] = False
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    file.write_text(json.dumps(values))


def sampling_options(
    request: RolloutRequest, *, temperature: float, seed: int, stop_token_ids: list[int]
) -> dict[str, Any]:
    """Fields of `vllm.SamplingParams`: what is sampled from is the softmax that is trained."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,  # off
        "max_tokens": request.max_new_tokens,
        "seed": seed,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": True,  # those of the model's configuration: ours are complete
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def request_seed(seed: int, index: int) -> int:
    """Of request `index` of a call with `seed`, in [0, 2**63)."""
    digest = hashlib.sha256(f"{seed},{index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
