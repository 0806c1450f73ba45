"""The loss of a token and its derivatives by log-probability and entropy, in torch (E4 to E8).

T tokens, B sequences. O(T); the vocabulary-sized code sees two numbers a row.
"""

import torch
from torch import Tensor

from .policy_config import LOG_RATIO_BOUND, PolicyConfig
from .tokens import Evaluation, Tokens, sequence_of_token


def evaluate(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    config: PolicyConfig,
    cu_seqlens: Tensor | None = None,  # [B + 1], where the ratio is of the sequence
) -> Evaluation:
    """Loss, derivatives and metrics."""
    old, rollout = tokens.old_log_probs, tokens.rollout_log_probs
    prefix = (
        torch.zeros_like(tokens.loss_mask) if tokens.prefix_mask is None else tokens.prefix_mask
    )
    mask = tokens.loss_mask
    if config.importance_cap is not None:
        mask = mask & (prefix | rollout.isfinite())

    def inside(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(log_probs.dtype), 0)

    lp, advantages = inside(log_probs), inside(tokens.advantages)
    log_ratio = torch.zeros_like(lp) if old is None else inside(log_probs - old)
    if config.importance_level == "sequence":
        log_ratio = _sequence_mean(log_ratio, mask, cu_seqlens)
    sloped = log_ratio.abs() <= LOG_RATIO_BOUND
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()

    low, high, prefix_low, prefix_high = (torch.full_like(lp, x) for x in config.ratio_bounds)
    low, high = torch.where(prefix, prefix_low, low), torch.where(prefix, prefix_high, high)
    policy = -advantages * ratio
    bounded = -advantages * ratio.clamp(low, high)
    clipped = bounded > policy
    loss = torch.maximum(policy, bounded)
    if config.dual_clip is None:
        dual = torch.zeros_like(mask)
    else:
        ceiling = -config.dual_clip * advantages
        dual = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
    slope = torch.where(sloped & ~clipped & ~dual, policy, 0)
    if config.importance_cap is not None:
        gap = inside((log_probs if old is None else old) - rollout).clamp(max=LOG_RATIO_BOUND)
        weight = torch.where(prefix, 1, gap.exp().clamp(max=config.importance_cap))
        loss, slope = loss * weight, slope * weight
    if config.importance_level == "sequence":
        slope = inside(_sequence_mean(slope, mask, cu_seqlens))

    ratio = inside(ratio)
    metrics = {
        "num_tokens": mask.sum(),
        "num_prefix": prefix.sum(),
        "num_selected": (mask & prefix).sum(),
        "num_dropped": (tokens.loss_mask & ~mask).sum(),
        "clipped_low": (clipped & (ratio < low)).sum(),
        "clipped_high": (clipped & (ratio > high)).sum(),
        "clipped_dual": dual.sum(),
        "ratio_sum": ratio.sum(),
        "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
        "approx_kl_sum": inside(ratio - 1 - log_ratio).sum(),
    }
    dentropy = None
    if entropy is not None:
        held = inside(entropy)
        metrics["entropy_sum"] = held.sum()
        if config.entropy_coef:
            loss = loss - config.entropy_coef * held
            dentropy = inside(torch.full_like(held, -config.entropy_coef))
    if config.uses_kl:
        kl, dkl = _kl(inside(log_probs - tokens.ref_log_probs), config.kl)
        metrics["kl_sum"] = kl.sum()
        loss, slope = loss + config.kl_coef * kl, slope + config.kl_coef * inside(dkl)
    metrics = {name: value.to(lp.dtype) for name, value in metrics.items()}
    return Evaluation(loss.sum(), slope, dentropy, metrics)


def _kl(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """KL to the reference from d = log_prob - ref_log_prob, and its derivative."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d * d / 2, d
    inverse = (-d).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return inverse + d - 1, 1 - torch.where(d.abs() <= LOG_RATIO_BOUND, inverse, 0)


def _sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token's mean of `x` over the masked tokens of its sequence; `x` is 0 elsewhere."""
    offsets = cu_seqlens.long()
    options = {"offsets": offsets, "axis": 0, "unsafe": True, "initial": 0}
    sums = torch.segment_reduce(x, "sum", **options)
    counts = torch.segment_reduce(mask.to(x.dtype), "sum", **options)
    return (sums / counts.clamp(min=1))[sequence_of_token(offsets, len(x))]
