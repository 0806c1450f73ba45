"""What TRL's own loss reports, from the outcome of the fused one."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


@torch.no_grad()
def loss_metrics(
    log_probs: Tensor,
    entropy: Tensor,
    inputs: Mapping[str, Tensor],
    mask: Tensor,
    *,
    accelerator: Accelerator,
    clip: tuple[float, float],
) -> dict[str, float]:
    """Entropy, clipped fractions and KL of a micro-batch of all processes, by TRL's names.

    Args:
        log_probs, entropy, mask: [B, C]; the latter of the tokens in the loss.
        inputs: those of the loss.
        clip: distance of the lowest and the highest ratio from 1.
    """
    old, advantages = inputs.get("old_per_token_logps"), inputs["advantages"]
    ratio = torch.ones_like(log_probs) if old is None else (log_probs - old).exp()
    is_low = (ratio < 1 - clip[0]) & (advantages < 0)
    is_high = (ratio > 1 + clip[1]) & (advantages > 0)
    per_token = {
        "entropy": entropy,
        "clip_ratio/low_mean": is_low,
        "clip_ratio/high_mean": is_high,
        "clip_ratio/region_mean": is_low | is_high,
    }
    if "ref_per_token_logps" in inputs:
        distance = inputs["ref_per_token_logps"] - log_probs
        per_token["kl"] = distance.exp() - distance - 1
    sums = torch.stack([mask.sum(), *((x * mask).sum() for x in per_token.values())])
    num_tokens, *totals = accelerator.reduce(sums.float()).tolist()
    found = {
        name: total / max(num_tokens, 1.0) for name, total in zip(per_token, totals, strict=True)
    }
    lengths = mask.sum(dim=1).clamp(min=1)
    by_row = torch.stack([(x * mask).sum(dim=1) / lengths for x in (is_low, is_high)], dim=1)
    low, high = accelerator.gather(by_row).unbind(dim=1)
    return found | {
        "clip_ratio/low_min": low.min().item(),
        "clip_ratio/high_max": high.max().item(),
    }
