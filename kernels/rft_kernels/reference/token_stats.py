"""Specification of `token_stats` (E1)."""

import torch
from torch import Tensor

from ..results import TokenStats


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """log softmax(logits / temperature) at the target, and the entropy of that distribution."""
    valid = targets != -100
    if row_mask is not None:
        valid = valid & row_mask
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits[..., :vocab_size].to(dtype)
    # Rows without an output are replaced before anything is computed, so nothing of theirs is used.
    z = torch.where(valid[..., None], z, 0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        z = z / torch.where(valid, temperature, 1).to(dtype)[..., None]
    else:
        z = z / temperature
    log_p = torch.log_softmax(z, -1)
    log_probs = log_p.gather(-1, torch.where(valid, targets, 0).long()[..., None])[..., 0]
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0)).sum(-1).clamp(max=0)
    return TokenStats(torch.where(valid, log_probs, 0), torch.where(valid, entropy, 0))
