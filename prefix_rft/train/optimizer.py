"""The optimizer of a run and its learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prefix_rft.config import OptimizerConfig, require_package


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer `config.name` for those of `parameters`, possibly sharded, that are trained.

    Args:
        device: where the update runs.
    Raises:
        ConfigError: the package of the optimizer is not installed.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.name == "adamw_8bit":
        return _adamw_8bit()(trained, **options)
    return torch.optim.AdamW(trained, **options, fused=device.type == "cuda" or None)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters, from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # compiled code holds this very tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate of `step` (from 0) of `num_steps`.

    After a linear warm-up it stays, or falls to `final_lr_fraction` of itself at `num_steps`.
    """
    warmup_steps = config.warmup_steps or round(config.warmup_fraction * num_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    match config.schedule:
        case "constant":
            left = 1.0
        case "linear":
            left = 1 - progress
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    require_package("torchao", "optimizer.name")
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    # The only operator that torchao lacks for a background checkpoint's copy to the host.
    @OptimState8bit.implements(torch.ops.aten.new_empty.default)
    def new_empty(func: Any, types: Any, args: tuple, kwargs: dict) -> OptimState8bit:
        like, size = args
        return OptimState8bit.zeros(
            size, like.signed, like.block_size, kwargs.get("device", like.device), like.dtype
        )

    return AdamW8bit
