"""The model as the trainer sees it, how it is loaded, sharded and written."""

from prefix_rft.model.distributed import World, attempt, full_tensor
from prefix_rft.model.loading import (
    eos_token_ids,
    export,
    host_config,
    load_model,
    load_model_config,
    load_policy,
    load_tokenizer,
    resolve_autocast_dtype,
    resolve_device,
    resolve_weight_dtypes,
    try_export,
)
from prefix_rft.model.policy import Policy
from prefix_rft.model.weights import full_weights, weight_shapes

__all__ = [
    "Policy",
    "World",
    "attempt",
    "eos_token_ids",
    "export",
    "full_tensor",
    "full_weights",
    "host_config",
    "load_model",
    "load_model_config",
    "load_policy",
    "load_tokenizer",
    "resolve_autocast_dtype",
    "resolve_device",
    "resolve_weight_dtypes",
    "try_export",
    "weight_shapes",
]
