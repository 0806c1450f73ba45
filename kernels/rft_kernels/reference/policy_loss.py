"""Specification of `prefix_rft_loss`: the composition of the other specifications."""

from fractions import Fraction

import torch
from torch import Tensor

from ..results import PolicyLoss
from .objective import DEFAULT_CONFIG, Config, policy_objective
from .selection import select_top_entropy
from .token_stats import token_stats

_FIFTH = Fraction(1, 5)


def prefix_rft_loss(
    logits: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    prefix_mask: Tensor | None,
    *,
    normalizer: float | Tensor,
    config: Config = DEFAULT_CONFIG,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    fraction: Fraction | float | str = _FIFTH,
    cu_seqlens: Tensor | None = None,
    selected_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    stats: str = "all",
    active_rows: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Statistics of every row, selection, objective."""
    options = {"softcap": softcap, "temperature": temperature, "vocab_size": vocab_size}
    found = token_stats(logits, targets, **options)
    in_response = response_mask & (targets != -100)
    prefix = torch.zeros_like(in_response) if prefix_mask is None else prefix_mask
    candidates = in_response & prefix
    if selected_mask is None:
        entropy = found.entropy.detach()
        selected = select_top_entropy(entropy, candidates, fraction=fraction, cu_seqlens=cu_seqlens)
    else:
        selected = selected_mask & candidates
    loss, metrics = policy_objective(
        found.log_probs,
        old_log_probs,
        advantages,
        in_response & (~prefix | selected),
        normalizer=normalizer,
        config=config,
        entropy=found.entropy,
        prefix_mask=candidates,
        cu_seqlens=cu_seqlens,
        rollout_log_probs=rollout_log_probs,
        ref_log_probs=ref_log_probs,
    )
    return PolicyLoss(loss, found.log_probs.detach(), found.entropy.detach(), selected, metrics)
