"""Low-rank adapters for a model's linear layers, except the head: y = W x + scale * B (A x)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

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

    body = set(model.get_decoder().layers.modules())
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and m in body]
    if not names:
        raise ConfigError(f"model.lora_rank: {type(model).__name__} has no linear layers to adapt")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for layer in _adapted(model):
        layer.cast_input_dtype_enabled = False  # autocast casts, without a float32 copy
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)


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
    return layer.base_layer.weight.to(up.dtype) + layer.scaling[_ADAPTER] * (up @ down)


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]
