"""Specification of `token_stats` and what else is read off a row (E1)."""

from typing import Any

import torch
from torch import Tensor

from ..results import LseStats, TokenStats


def token_stats(logits: Tensor, targets: Tensor, **options: Any) -> TokenStats:
    """log softmax(logits / temperature) at the target, and the entropy of that distribution."""
    return TokenStats(*token_stats_with_lse(logits, targets, **options)[:2])


def token_stats_with_lse(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> LseStats:
    valid = targets != -100
    if row_mask is not None:
        valid = valid & row_mask
    z = _scaled(logits, valid, softcap, temperature, vocab_size)
    log_p = torch.log_softmax(z, -1)
    log_probs = log_p.gather(-1, torch.where(valid, targets, 0).long()[..., None])[..., 0]
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0)).sum(-1).clamp(max=0)
    lse = torch.logsumexp(z, -1)
    return LseStats(*(torch.where(valid, x, 0) for x in (log_probs, entropy, lse)))


def sum_squared_probs(
    logits: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    valid = logits.new_ones(logits.shape[:-1], dtype=torch.bool) if row_mask is None else row_mask
    p = torch.softmax(_scaled(logits, valid, softcap, temperature, vocab_size), -1)
    return torch.where(valid, p.square().sum(-1), 0)


def _scaled(
    logits: Tensor,
    valid: Tensor,
    softcap: float | None,
    temperature: float | Tensor,
    vocab_size: int | None,
) -> Tensor:
    """The logits that the softmax is of."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits[..., :vocab_size].to(dtype)
    # Rows without an output are replaced before anything is computed, so nothing of theirs is used.
    z = torch.where(valid[..., None], z, 0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        return z / torch.where(valid, temperature, 1).to(dtype)[..., None]
    return z / temperature
