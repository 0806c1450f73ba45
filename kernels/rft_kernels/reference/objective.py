"""Specification of `policy_objective` (E4 to E8)."""

from typing import NamedTuple

import torch
from torch import Tensor

_LOG_RATIO_BOUND = 20.0


class Config(NamedTuple):
    """The choices of a loss and their defaults, by the names of `rft_kernels.PolicyConfig`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    prefix_clip: str | tuple[float, float] = "same"
    importance_level: str = "token"
    importance_cap: float | None = None
    entropy_coef: float = 0.0
    kl: str = "none"
    kl_coef: float = 0.0


DEFAULT_CONFIG = Config()


def policy_objective(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    normalizer: float | Tensor,
    config: Config = DEFAULT_CONFIG,
    entropy: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One sequence at a time, only the tokens of the loss gathered."""
    shape, bound = log_probs.shape, _LOG_RATIO_BOUND
    prefix = torch.zeros_like(loss_mask) if prefix_mask is None else prefix_mask
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
    elif len(shape) > 1:
        bounds = list(range(0, shape.numel() + 1, shape[-1])) if shape[-1] else [0]
    else:
        bounds = [0, shape.numel()]
    if advantages.shape != shape:
        lengths = torch.tensor(bounds).diff()
        advantages = advantages.flatten().repeat_interleave(lengths.to(advantages.device))

    def flat(x: Tensor) -> Tensor:
        return x.flatten()

    def given(x: Tensor) -> Tensor:
        return x.detach().flatten().to(log_probs.dtype)

    count = log_probs.new_zeros(())
    sums = dict.fromkeys(
        ("tokens", "selected", "dropped", "low", "high", "dual", "ratio", "k3", "entropy", "kl"),
        count,
    )
    total, largest = log_probs.sum() * 0 if not loss_mask.any() else count, count
    for start, stop in zip(bounds, bounds[1:], strict=False):
        inside = torch.arange(start, stop, device=log_probs.device)
        inside = inside[flat(loss_mask)[inside]]
        is_prefix = flat(prefix)[inside]
        if config.importance_cap is not None:
            usable = is_prefix | given(rollout_log_probs)[inside].isfinite()
            sums["dropped"] = sums["dropped"] + (~usable).sum()
            inside, is_prefix = inside[usable], is_prefix[usable]
        if not len(inside):
            continue
        new, a = flat(log_probs)[inside], given(advantages)[inside]
        old = new.detach() if old_log_probs is None else given(old_log_probs)[inside]
        log_ratio = new - old
        if config.importance_level == "sequence":
            log_ratio = log_ratio.mean().expand(len(inside))
        log_ratio = log_ratio.clamp(-bound, bound)
        ratio = log_ratio.exp()

        low, high = 1 - config.clip_low, 1 + config.clip_high
        below, above = torch.full_like(ratio, low), torch.full_like(ratio, high)
        if config.prefix_clip == "none":
            below[is_prefix], above[is_prefix] = -torch.inf, torch.inf
        elif config.prefix_clip != "same":
            below[is_prefix] = 1 - config.prefix_clip[0]
            above[is_prefix] = 1 + config.prefix_clip[1]
        policy, bounded = -a * ratio, -a * ratio.clamp(below, above)
        sums["low"] = sums["low"] + ((bounded > policy) & (ratio < below)).sum()
        sums["high"] = sums["high"] + ((bounded > policy) & (ratio > above)).sum()
        loss = torch.maximum(policy, bounded)
        if config.dual_clip is not None:
            ceiling = -config.dual_clip * a
            sums["dual"] = sums["dual"] + ((a < 0) & (loss > ceiling)).sum()
            loss = torch.where(a < 0, torch.minimum(loss, ceiling), loss)
        if config.importance_cap is not None:
            gap = (old - given(rollout_log_probs)[inside]).clamp(max=bound)
            loss = loss * torch.where(is_prefix, 1, gap.exp().clamp(max=config.importance_cap))
        total = total + loss.sum()
        if entropy is not None:
            sums["entropy"] = sums["entropy"] + flat(entropy)[inside].sum()
        if config.kl != "none" and config.kl_coef:
            d = new - given(ref_log_probs)[inside]
            k3 = (-d).clamp(-bound, bound).exp() + d - 1
            sums["kl"] = sums["kl"] + {"k1": d, "k2": d**2 / 2, "k3": k3}[config.kl].sum()
        sums["tokens"] = sums["tokens"] + len(inside)
        sums["selected"] = sums["selected"] + is_prefix.sum()
        sums["ratio"] = sums["ratio"] + ratio.sum()
        sums["k3"] = sums["k3"] + (ratio - 1 - log_ratio).sum()
        largest = torch.maximum(largest, ratio.max())

    total = total - config.entropy_coef * sums["entropy"] + config.kl_coef * sums["kl"]
    metrics = {
        "num_tokens": sums["tokens"],
        "num_prefix": prefix.sum(),
        "num_selected": sums["selected"],
        "num_dropped": sums["dropped"],
        "clipped_low": sums["low"],
        "clipped_high": sums["high"],
        "clipped_dual": sums["dual"],
        "ratio_sum": sums["ratio"],
        "ratio_max": largest,
        "approx_kl_sum": sums["k3"],
    }
    if entropy is not None:
        metrics["entropy_sum"] = sums["entropy"]
    if config.kl != "none" and config.kl_coef:
        metrics["kl_sum"] = sums["kl"]
    metrics = {name: value.detach().to(log_probs.dtype) for name, value in metrics.items()}
    return total / normalizer, metrics
