"""The sizes that determine the memory of a run: of the model, without weights, and of its place."""

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from prefix_rft.checks import ConfigError
from prefix_rft.config import START, Config, make_method, model_at
from prefix_rft.doctor.architectures import SIZES
from prefix_rft.model import (
    adaptable_layers,
    decoder_layers,
    resolve_autocast_dtype,
    resolve_weight_dtypes,
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one process of a run runs."""

    device: torch.device
    device_bytes: int  # memory of the device; for a CPU, what this process has of the machine's
    num_processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter, and the group with which FSDP gathers it if the model is sharded."""

    group: str
    shape: tuple[int, ...]
    itemsize: int  # bytes per number
    is_trained: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def local_numel(self, num_shards: int) -> int:
        """Numbers in the largest shard, which FSDP cuts along the first dimension."""
        return ceil(self.shape[0] / num_shards) * prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Shapes:
    weights: tuple[Weight, ...]
    reference: tuple[Weight, ...] = ()  # of a second model, for a KL term
    layers: int
    hidden: int
    query: int  # heads x head size
    key: int  # key-value heads x head size
    ffn: int
    vocabulary: int
    lora_rank: int  # 0: no adapters
    tokens: int  # in the largest micro-batch
    sequences: int  # generated at once
    length: int  # tokens of the longest sequence, prompt included
    compute_bytes: int  # per number in the input of a linear layer
    residual_bytes: int  # per number between two layers
    source: str  # where the sizes come from

    @property
    def num_parameters(self) -> int:
        """Parameters of the model itself, without adapters."""
        has_adapters = self.lora_rank > 0
        return sum(w.numel for w in self.weights if not (has_adapters and w.is_trained))


def shapes_of(config: Config, place: Place) -> Shapes:
    """The shapes of a run of `config`.

    Raises:
        ConfigError: the sizes of the model cannot be read, or it has no layers to adapt.
    """
    model_config, source = _model_config(config, "model.path")
    loaded, trained = resolve_weight_dtypes(config.model, place.device)
    compute = resolve_autocast_dtype(config.model, place.device) or trained
    model = _on_meta(model_config, loaded)
    adapters: tuple[Weight, ...] = ()
    if config.model.lora_rank is not None:
        model.requires_grad_(False)
        adapters = _adapters(model, config.model.lora_rank, trained)
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    length = config.data.max_prompt_tokens + config.rollout.max_response_length
    is_sharded = place.num_processes > 1 or config.sharding.cpu_offload
    weights = _weights(model) + adapters
    return Shapes(
        weights=weights,
        reference=_reference(config, weights, compute),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_size,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        ffn=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        lora_rank=config.model.lora_rank or 0,
        tokens=max(config.trainer.micro_batch_tokens, length),
        sequences=min(
            config.rollout.max_batch_sequences,
            ceil(config.trainer.prompts_per_step / place.num_processes) * config.rollout.group_size,
        ),
        length=length,
        compute_bytes=compute.itemsize,
        residual_bytes=compute.itemsize if is_sharded else loaded.itemsize,
        source=source,
    )


def _reference(config: Config, own: tuple[Weight, ...], dtype: torch.dtype) -> tuple[Weight, ...]:
    """The weights of the reference; none where there is none, or where frozen weights of the
    policy are it.

    Args:
        own: those of the policy.
        dtype: of the compute.
    """
    if not make_method(config, eos_token_id=0).uses_reference:  # whatever ends a response
        return ()
    if config.reference.model != START:
        return _weights(_on_meta(_model_config(config, "reference.model")[0], dtype))
    if config.model.lora_rank is None:
        return tuple(replace(weight, itemsize=dtype.itemsize) for weight in own)
    return own if config.reference.update_every else ()


def _on_meta(model_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype)


def _weights(model: PreTrainedModel) -> tuple[Weight, ...]:
    head = model.get_output_embeddings().weight
    is_tied = head is model.get_input_embeddings().weight

    def group(name: str, weight: torch.Tensor) -> str:
        outside = "lm_head" if weight is head and not is_tied else "root"
        return _layer(model, name) or outside

    return tuple(
        Weight(
            group=group(name, weight),
            shape=tuple(weight.shape),
            itemsize=weight.itemsize,
            is_trained=weight.requires_grad,
        )
        for name, weight in model.named_parameters()
    )


def _adapters(model: PreTrainedModel, rank: int, dtype: torch.dtype) -> tuple[Weight, ...]:
    """A and B of each layer that `lora.add_adapters` adapts; planning them does not need peft."""
    return tuple(
        Weight(
            group=_layer(model, name) or "root",
            shape=shape,
            itemsize=dtype.itemsize,
            is_trained=True,
        )
        for name, layer in adaptable_layers(model).items()
        for shape in _adapter_shapes(layer, rank)
    )


def _adapter_shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    num_out, num_in = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
    return (rank, num_in), (num_out, rank)


def _layer(model: PreTrainedModel, name: str) -> str | None:
    """The number of the decoder layer that contains a parameter or module; None: no layer."""
    layers = f"{decoder_layers(model)[0]}."
    return name.removeprefix(layers).split(".")[0] if name.startswith(layers) else None


def _model_config(
    config: Config, key: Literal["model.path", "reference.model"]
) -> tuple[PreTrainedConfig, str]:
    """The configuration of the model that `key` names, and its source."""
    base = config.base
    path = config.model.path if key == "model.path" else config.reference.model
    if path is None:
        sizes = Qwen2Config(
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            num_hidden_layers=base.num_layers,
            num_attention_heads=base.num_heads,
            num_key_value_heads=base.num_heads,
            intermediate_size=base.intermediate_size,
            tie_word_embeddings=True,
        )
        return sizes, "section [base]"
    path = model_at(path)
    if path in SIZES:
        try:
            return AutoConfig.from_pretrained(
                path, local_files_only=True
            ), f"{path} on this machine"
        except OSError:
            return AutoConfig.for_model(**SIZES[path]), f"{path} as shipped with prefix_rft"
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False), path
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: expected a model folder or a hub id that can be reached, got {path!r} "
            f"({reason})"
        ) from error
