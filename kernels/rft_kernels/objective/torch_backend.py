"""The loss of a token and its derivatives by log-probability and entropy, in torch (E4 to E8).

T tokens, B sequences. O(T); the vocabulary-sized code sees two numbers a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .policy_config import LOG_RATIO_BOUND, Terms
from .tokens import Evaluation, Tokens, sequence_of_token


def evaluate(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    terms: Terms,
    cu_seqlens: Tensor | None = None,  # [B + 1]; given: one ratio a sequence
) -> Evaluation:
    """Loss, derivatives and metrics."""
    old, prefix, mask = tokens.old_log_probs, tokens.prefix_mask, tokens.loss_mask
    if prefix is None:
        prefix = torch.zeros_like(mask)
    if terms.importance_cap is not None:
        mask = mask & (prefix | tokens.rollout_log_probs.isfinite())

    def inside(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(log_probs.dtype), 0)

    log_ratio = torch.zeros_like(log_probs) if old is None else inside(log_probs - old)
    if cu_seqlens is not None:
        log_ratio = _sequence_mean(log_ratio, mask, cu_seqlens)
    policy = clipped_policy(log_ratio, inside(tokens.advantages), prefix, terms)
    loss, slope = policy.loss, policy.slope
    if terms.importance_cap is not None:
        gap = inside((log_probs if old is None else old) - tokens.rollout_log_probs)
        weight = gap.clamp(max=LOG_RATIO_BOUND).exp().clamp(max=terms.importance_cap)
        weight = torch.where(prefix, 1, weight)
        loss, slope = loss * weight, slope * weight
    if cu_seqlens is not None:
        slope = inside(_sequence_mean(slope, mask, cu_seqlens))

    ratio = inside(policy.ratio)
    metrics = {
        "num_tokens": mask.sum(),
        "num_prefix": prefix.sum(),
        "num_selected": (mask & prefix).sum(),
        "num_dropped": (tokens.loss_mask & ~mask).sum(),
        "clipped_low": policy.clipped_low.sum(),
        "clipped_high": policy.clipped_high.sum(),
        "clipped_dual": policy.clipped_dual.sum(),
        "ratio_sum": ratio.sum(),
        "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
        "approx_kl_sum": inside(ratio - 1 - _bounded(log_ratio)).sum(),
    }
    dentropy = None
    if entropy is not None:
        held = inside(entropy)
        metrics["entropy_sum"] = held.sum()
        if terms.entropy_coef:
            loss = loss - terms.entropy_coef * held
            dentropy = inside(torch.full_like(held, -terms.entropy_coef))
    if terms.kl != "none":
        kl, dkl = kl_term(inside(log_probs - tokens.ref_log_probs), terms.kl)
        metrics["kl_sum"] = kl.sum()
        loss, slope = loss + terms.kl_coef * kl, slope + terms.kl_coef * inside(dkl)
    metrics = {name: value.to(log_probs.dtype) for name, value in metrics.items()}
    return Evaluation(loss.sum(), slope, dentropy, metrics)


class ClippedPolicy(NamedTuple):
    """The clipped policy term of each token, all [T]."""

    loss: Tensor
    slope: Tensor  # derivative of the loss by the log-ratio
    ratio: Tensor
    clipped_low: Tensor  # bool: the lower bound holds, and there is no slope
    clipped_high: Tensor
    clipped_dual: Tensor


def clipped_policy(
    log_ratio: Tensor, advantages: Tensor, prefix: Tensor, terms: Terms
) -> ClippedPolicy:
    """max(-A r, -A clip(r)), at most -A c for A < 0 with a dual clip (E4); differentiable too."""
    ratio = _bounded(log_ratio).exp()
    low, high, prefix_low, prefix_high = (torch.full_like(ratio, x) for x in terms.clip_range)
    low, high = torch.where(prefix, prefix_low, low), torch.where(prefix, prefix_high, high)
    policy = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(low, high)
    clipped = clipped_loss > policy
    loss = torch.maximum(policy, clipped_loss)
    dual = torch.zeros_like(prefix)
    if terms.dual_clip is not None:
        ceiling = -terms.dual_clip * advantages
        dual = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
    sloped = (log_ratio.abs() <= LOG_RATIO_BOUND) & ~clipped & ~dual
    slope = torch.where(sloped, policy, 0)
    low, high = clipped & (ratio < low), clipped & (ratio > high)
    return ClippedPolicy(loss, slope, ratio, low, high, dual)


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def kl_term(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """KL to the reference from d = log_prob - ref_log_prob, and its derivative."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d * d / 2, d
    inverse = _bounded(-d).exp()
    return inverse + d - 1, 1 - torch.where(d.abs() <= LOG_RATIO_BOUND, inverse, 0)


def _sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token's mean of `x` over the masked tokens of its sequence; `x` is 0 elsewhere."""
    offsets = cu_seqlens.long()
    options = {"offsets": offsets, "axis": 0, "unsafe": True, "initial": 0}
    sums = torch.segment_reduce(x, "sum", **options)
    counts = torch.segment_reduce(mask.to(x.dtype), "sum", **options)
    return (sums / counts.clamp(min=1))[sequence_of_token(offsets, len(x))]
