"""The model as the trainer sees it, how it is loaded, sharded and written."""

from prefix_rft.model.attention import check_micro_batches
from prefix_rft.model.distributed import World, attempt, full_tensor
from prefix_rft.model.loading import (
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
from prefix_rft.model.lora import adaptable_layers, decoder_layers, without_adapters
from prefix_rft.model.policy import Policy
from prefix_rft.model.vocabulary import end_of_response_id, stop_token_ids, vocabulary_size
from prefix_rft.model.weights import full_weights, weight_shapes

__all__ = [
    "Policy",
    "World",
    "adaptable_layers",
    "attempt",
    "check_micro_batches",
    "decoder_layers",
    "end_of_response_id",
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
    "stop_token_ids",
    "try_export",
    "vocabulary_size",
    "weight_shapes",
    "without_adapters",
]
