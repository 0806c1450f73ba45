"""What a token brings to its loss beside log_prob and entropy: checked, flattened, cut by rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .policy_config import PolicyConfig


class Tokens(NamedTuple):
    """What a token's loss depends on beside its log_prob and entropy; all `[T]`, or None."""

    advantages: Tensor
    loss_mask: Tensor  # values elsewhere are never used, whatever they are
    old_log_probs: Tensor | None = None  # None: on-policy, the ratio is 1 and has its slope
    prefix_mask: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None

    def at(self, rows: slice | Tensor) -> "Tokens":
        return Tokens(*(None if x is None else x[rows] for x in self))


class Evaluation(NamedTuple):
    """The sum over tokens, and its derivatives, 0 outside the loss."""

    loss: Tensor  # 0-dim
    dlog_probs: Tensor  # [T]
    dentropy: Tensor | None  # [T]; None: the loss does not see the entropy
    metrics: dict[str, Tensor]  # 0-dim


def check_scale(config: PolicyConfig, normalizer: float | Tensor) -> None:
    if not isinstance(config, PolicyConfig):
        raise TypeError(f"config must be a PolicyConfig, got {type(config).__name__}")
    _check.normalizer(normalizer)


def check_tokens(
    like: Tensor,  # [...] of any float dtype
    old_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    prefix_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    rollout_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    config: PolicyConfig,
) -> tuple[Tokens, Tensor | None]:
    """Checks and flattens what the loss takes per token; and the bounds of its sequences."""
    shape, num_tokens = like.shape, like.numel()
    _check.mask("loss_mask", loss_mask, like)
    if prefix_mask is not None:
        _check.mask("prefix_mask", prefix_mask, like)
    given = {
        "old_log_probs": old_log_probs,
        "rollout_log_probs": rollout_log_probs,
        "ref_log_probs": ref_log_probs,
    }
    for name, value in given.items():
        if value is not None:
            _check.tensor(name, value, shape=shape, like=like)
    _check.tensor("advantages", advantages, like=like)
    if config.importance_cap is not None and rollout_log_probs is None:
        raise ValueError("rollout_log_probs must be given, as config.importance_cap is set")
    if config.uses_kl and ref_log_probs is None:
        raise ValueError(f"ref_log_probs must be given, as config.kl is {config.kl!r}")

    if cu_seqlens is not None:
        _check.cu_seqlens(cu_seqlens, num_tokens, like)
    elif len(shape) > 1:
        if config.importance_level == "sequence" or advantages.shape != shape:
            rows, length = shape[:-1].numel(), shape[-1]
            cu_seqlens = torch.arange(rows + 1, device=like.device) * length
    elif config.importance_level == "sequence":
        raise ValueError(
            "cu_seqlens must be given, or tokens as [B, L], for a ratio of the sequence"
        )

    if advantages.shape != shape:
        num_sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        if cu_seqlens is None or advantages.numel() != num_sequences:
            raise ValueError(
                f"advantages must have shape {list(shape)}, or one entry for each of the "
                f"{num_sequences} sequences, got {list(advantages.shape)}"
            )
        advantages = advantages.reshape(-1)[sequence_of_token(cu_seqlens, num_tokens)]
    tokens = (advantages, loss_mask, old_log_probs, prefix_mask, rollout_log_probs, ref_log_probs)
    return Tokens(*(None if x is None else x.detach().reshape(-1) for x in tokens)), cu_seqlens


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.bucketize(positions, cu_seqlens[1:].long(), right=True)
