"""Liger's GRPO losses and cross entropies, with the signatures of Liger 0.8.5."""

from ._liger_cross_entropy import (
    LigerCrossEntropyFunction,
    LigerFusedLinearCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyFunction,
)
from ._liger_grpo_linear import LigerFusedLinearGRPOFunction, LigerFusedLinearGRPOLoss
from ._liger_grpo_logits import GrpoLossFunction, fused_selective_log_softmax, triton_grpo_loss
from ._patch import Patch, install, refusing

__all__ = [
    "GrpoLossFunction",
    "LigerCrossEntropyFunction",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "fused_selective_log_softmax",
    "patch",
    "triton_grpo_loss",
]


def patch() -> Patch:
    """Serves Liger's losses from here, until the handle it returns is undone.

    Objects of Liger's that exist already are served as well.

    Raises:
        ImportError: Liger, or a name expected in it, is missing.
    """
    chunked = "liger_kernel.chunked_loss"
    function = LigerFusedLinearGRPOFunction
    cross_entropies = (
        LigerCrossEntropyFunction,
        LigerFusedLinearCrossEntropyFunction,
        LigerFusedLinearScaledCrossEntropyFunction,
    )
    return install(
        "liger_kernel",
        {
            "liger_kernel.transformers.grpo_loss:triton_grpo_loss": triton_grpo_loss,
            f"{chunked}.grpo_loss:{function.__name__}": function,
            f"{chunked}.functional:liger_fused_linear_grpo": function.apply,
            "liger_kernel.ops:GrpoLossFunction": GrpoLossFunction,
            "liger_kernel.ops.grpo_loss:fused_selective_log_softmax": fused_selective_log_softmax,
        }
        | {f"liger_kernel.ops:{x.__name__}": x for x in cross_entropies},
    )


_OVER_RANKS = "its rows are shards of classes; see `linear_token_stats(process_group=)`"
__getattr__ = refusing(
    __name__,
    {
        "LigerFusedLinearScaledCrossEntropyTPFunction": _OVER_RANKS,
        "LigerVocabParallelCEFunction": _OVER_RANKS,
        "LigerFusedCETVDFunction": "a row of it has the distributions of two models",
    },
)
