"""Low-rank adapters for a model's linear layers, except the head: y = W x + scale * B (A x)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefix_rft.checks import ConfigError
from prefix_rft.config import require_package

_ADAPTER = "default"  # peft's name for it; there is only one


def add_adapters(
    model: PreTrainedModel, *, rank: int, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    """Freeze `model` and add a trainable adapter to each linear layer of its decoder layers.

    Args:
        rank: number of columns of B and rows of A.
        alpha: the scale is alpha / rank.
        dtype: of A and B.
        seed: for the random A; B starts at zero, so the model's outputs do not change.
    Raises:
        ConfigError: peft is not installed, or the model has no such layer.
    """
    require_package("peft", "model.lora_rank")
    from peft import LoraConfig, inject_adapter_in_model

    layers = adaptable_layers(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for layer in _adapted(model):
        layer.cast_input_dtype_enabled = False  # autocast casts, without a float32 copy
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The layers that a token passes one after the other, and their name in `model`.

    Raises:
        ConfigError: the model has no such list.
    """
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    children = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    for name, module in model.named_modules():
        if any(module is child for child in children):
            return name, module
    raise ConfigError(f"model.path: {type(model).__name__} has no list of {count} decoder layers")


def adaptable_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers within the decoder layers of `model`, by name.

    Raises:
        ConfigError: there are none.
    """
    body = set(decoder_layers(model)[1].modules())
    found = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m in body}
    if not found:
        raise ConfigError(f"model.lora_rank: {type(model).__name__} has no linear layers to adapt")
    return found


def unadapted_weights(model: PreTrainedModel) -> str | None:
    """Which matrices of the decoder layers no adapter changes, in words; None: there are none.

    The experts of a mixture are no linear layers.
    """
    body = {n: p for n, p in decoder_layers(model)[1].named_parameters() if not is_adapter(n)}
    left = {n: p for n, p in body.items() if p.ndim > 1 and ".base_layer." not in n}
    if not left:
        return None
    names = sorted({re.sub(r"\b\d+\.", "", name.removesuffix(".weight")) for name in left})
    share = sum(p.numel() for p in left.values()) / sum(p.numel() for p in body.values())
    return f"{', '.join(names)} ({share:.0%} of the weights of the decoder layers)"


def adapted_weights(model: nn.Module) -> dict[int, nn.Module]:
    """The adapted layers of `model`, keyed by the id of their frozen weight."""
    return {id(layer.base_layer.weight): layer for layer in _adapted(model)}


def is_adapter(name: str) -> bool:
    """Whether the parameter called `name` is an A or a B."""
    return ".lora_A." in name or ".lora_B." in name


def merged_name(name: str) -> str:
    """The name of a frozen parameter in the model without adapters."""
    return name.replace(".base_layer.", ".")


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """W + scale * B A in the dtype of B, sharded like W. Collective if W is sharded."""
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    if isinstance(down, DTensor):
        down = down.redistribute(placements=[Replicate()] * down.device_mesh.ndim)
    change = layer.scaling[_ADAPTER] * (up @ down)
    # A Conv1D holds its weight transposed.
    return layer.base_layer.weight.to(up.dtype) + (change.T if layer.fan_in_fan_out else change)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While entered, `model` computes as if it had no adapters."""
    layers = _adapted(model)
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[_ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]
