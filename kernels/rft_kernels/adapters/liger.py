"""Liger's `triton_grpo_loss`, with the signature of Liger 0.8.5, served by `token_stats`.

B sequences, L completion tokens, V classes. Liger's losses are functions of the log-probability
alone: these are written here in O(B L) of torch, and the vocabulary-sized work is ours.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from rft_kernels._check import NO_TARGET
from rft_kernels.token_stats import token_stats

from ._patch import Patch, install

_CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
_LOSS_TYPES = (*_CLIPPED, "cispo", "sapo", "vespo")
_LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT = math.log(1e-8), 20.0  # of vespo


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple:
    """The losses of the GRPO family from logits; arguments, defaults and results are Liger's.

    Args:
        logits: [B, L + 1, V]; the last row of a sequence predicts nothing and gets no gradient.
        old_logp: [B, L], or None: on-policy.
        ref_logp: [B, L], where `beta` is not 0.
        completion_ids: [B, L] int.
        advantages: [B].
        completion_mask: [B, L], 0 outside the loss, or None.
        inplace: the backward writes the gradient over `logits`.
        loss_type: "grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo" or "vespo".
        vllm_is_ratio: [B, L], [B, 1] or [B], the weight of the policy term.
        others: numbers as Liger documents them.
    Returns:
        (loss, kl or None, is_clipped), [B, L] float32 each, 0 outside the mask; with `reduce`
        (loss, [mean kl where beta is not 0, mean of is_clipped]), 0-dim.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, value or combination.
    Differentiable once in `logits` through the loss. Rows outside the mask are not read.
    """
    sequence_level = importance_sampling_level == "sequence"
    if loss_type not in _LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(_LOSS_TYPES)}, got {loss_type!r}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            "importance_sampling_level must be 'token' or 'sequence', "
            f"got {importance_sampling_level!r}"
        )
    if loss_type not in _CLIPPED and (sequence_level or delta is not None):
        raise ValueError(f"loss_type {loss_type!r} has neither a sequence level nor delta")
    if loss_type == "sapo" and min(sapo_temperature_pos, sapo_temperature_neg) <= 0:
        raise ValueError("sapo_temperature_pos and sapo_temperature_neg must be above 0")
    if beta != 0 and ref_logp is None:
        raise ValueError("ref_logp must be given, as beta is not 0")

    if completion_mask is None:
        inside = torch.ones_like(completion_ids, dtype=torch.bool)
    else:
        inside = completion_mask != 0
    targets = torch.where(inside, completion_ids, NO_TARGET)
    targets = torch.nn.functional.pad(targets, (0, 1), value=NO_TARGET)
    log_probs = token_stats(
        logits, targets, temperature=temperature, inplace_backward=inplace
    ).log_probs[:, :-1]
    mask = inside.to(log_probs.dtype)
    old = log_probs.detach() if old_logp is None else old_logp
    log_ratio = torch.where(inside, log_probs - old, 0)
    if sequence_level:
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    advantage = advantages[:, None]
    weight = vllm_is_ratio
    if weight is not None and weight.dim() == 1:
        weight = weight[:, None]

    is_clipped = torch.zeros_like(log_probs)
    if loss_type in _CLIPPED:
        low, high = 1 - eps_low, 1 + eps_high
        is_clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
    elif loss_type == "cispo":
        is_clipped = (ratio > eps_high) & (advantage > 0)
        loss = -ratio.detach().clamp(max=eps_high) * advantage * log_probs
    elif loss_type == "sapo":
        steepness = torch.where(advantage > 0, sapo_temperature_pos, sapo_temperature_neg)
        loss = -(steepness * (ratio - 1)).sigmoid() * 4 / steepness * advantage
    else:
        k = torch.where(advantage >= 0, vespo_k_pos, vespo_k_neg)
        rate = torch.where(advantage >= 0, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
        phi = _vespo_weight(log_ratio.detach(), weight, k, rate)
        loss, weight = -phi * advantage * log_probs, None
    if weight is not None:
        loss = loss * weight
    kl = None
    if beta != 0:
        gap = torch.where(inside, ref_logp - log_probs, 0)
        kl = gap.exp() - gap - 1
        kl = kl * ratio if use_bias_correction_kl else kl
        loss = loss + beta * kl
        kl = torch.where(inside, kl, 0).detach()
    loss = torch.where(inside, loss, 0)  # a ratio of the sequence spreads over its tokens here
    is_clipped = torch.where(inside, is_clipped, 0).to(log_probs.dtype)
    if not reduce:
        return loss, kl, is_clipped
    num_tokens = mask.sum().clamp(min=1)
    metrics = [x.sum() / num_tokens for x in (kl, is_clipped) if x is not None]
    return _reduced(loss, mask, loss_type, max_completion_length, num_items_in_batch), metrics


def _vespo_weight(
    log_ratio: Tensor,  # [B, L], 0 outside the mask
    weight: Tensor | None,  # [B, L] or [B, 1]
    k: Tensor,  # [B, 1]
    rate: Tensor,  # [B, 1]
) -> Tensor:
    """w^k e^(rate (1 - w)), [B, 1], w the product of a sequence's ratios and weights."""
    low, high = _LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT
    total = log_ratio.clamp(-high, high).sum(-1, keepdim=True)
    if weight is not None:
        total = total + weight.log().clamp(low, high).sum(-1, keepdim=True)
    total = total.clamp(low, high)
    phi = (rate + k * total - rate * total.exp()).exp()
    return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _reduced(
    loss: Tensor,  # [B, L], 0 outside the mask
    mask: Tensor,  # [B, L]
    loss_type: str,
    max_completion_length: int | None,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    lengths = mask.sum(-1)
    if loss_type in ("grpo", "sapo"):
        return (loss.sum(-1) / lengths.clamp(min=1)).mean()
    if loss_type == "bnpo":
        return loss.sum() / lengths.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        length = loss.shape[1] if max_completion_length is None else max_completion_length
        return loss.sum() / (len(loss) * length)
    if loss_type == "luspo":
        return (loss * lengths[:, None]).mean()
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items_in_batch is None:
        num_tokens = lengths.sum()
        if ranks > 1:
            dist.all_reduce(num_tokens)
    else:
        num_tokens = torch.as_tensor(num_items_in_batch, dtype=loss.dtype, device=loss.device)
    return loss.sum() / (num_tokens / ranks).clamp(min=1)


def patch() -> Patch:
    """Serves Liger's `triton_grpo_loss` from here, until the handle it returns is undone.

    Raises:
        ImportError: Liger, or the function, is missing.
    """
    place = "liger_kernel.transformers.grpo_loss:triton_grpo_loss"
    return install("liger_kernel", {place: triton_grpo_loss})
