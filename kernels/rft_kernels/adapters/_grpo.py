"""Losses of the GRPO family as Liger 0.8.5 defines them, from log-probabilities: O(B L) of torch.

B sequences, L completion tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check
from ..objective import Terms, clipped_policy, kl_term

_CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
_LOSS_TYPES = (*_CLIPPED, "cispo", "sapo", "vespo")
_LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT = math.log(1e-8), 20.0  # bounds in vespo


class Options(NamedTuple):
    """What one loss is made of; Liger documents the numbers."""

    loss_type: str
    importance_sampling_level: str
    beta: float
    eps_low: float
    eps_high: float
    delta: float | None
    use_bias_correction_kl: bool
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    @property
    def terms(self) -> Terms:
        """Of the losses that clip; `delta` bounds the ratio whatever the advantage's sign."""
        highest = 1 + self.eps_high
        delta = math.inf if self.delta is None else self.delta
        return Terms(
            clip_range=2 * [1 - self.eps_low, min(highest, delta)],
            dual_clip=None if self.delta is None else max(highest, delta),
            importance_cap=None,
            entropy_coef=0.0,
            kl="none",
            kl_coef=0.0,
        )

    def check(self) -> None:
        """ValueError for what is no loss."""
        kind, level = self.loss_type, self.importance_sampling_level
        if kind not in _LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(_LOSS_TYPES)}, got {kind!r}")
        if level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be 'token' or 'sequence', got {level!r}"
            )
        if kind not in _CLIPPED and (level == "sequence" or self.delta is not None):
            raise ValueError(f"loss_type {kind!r} has neither a sequence level nor delta")
        _check.number("eps_low", self.eps_low, may_be_infinite=True)
        _check.number("eps_high", self.eps_high, may_be_infinite=True)
        if self.delta is not None:
            _check.number("delta", self.delta, above=0, may_be_infinite=True)
        for name in ("beta", *(x for x in self._fields if x.startswith("vespo"))):
            _check.number(name, getattr(self, name))
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            _check.number(name, getattr(self, name), above=0 if kind == "sapo" else None)


def check_shapes(
    like: Tensor,  # [B, L, ...]
    advantages: Tensor,
    weight: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    **others: Tensor | None,
) -> None:
    """Refuses all but `others` [B, L], advantages [B] and a weight of the three shapes.

    Liger checks less, and what is broadcast instead gives another loss.
    """
    if like.dim() != 3:
        raise ValueError(f"_input or logits must have 3 dimensions, got {list(like.shape)}")
    shape = like.shape[:2]
    for name, value in others.items():
        if value is not None:
            _check.tensor(name, value, dtypes=(), shape=shape, like=like)
    _check.tensor("advantages", advantages, dtypes=(), shape=shape[:1], like=like)
    if weight is not None:
        allowed = (shape, torch.Size((shape[0], 1)), shape[:1])
        if weight.shape not in allowed:
            wanted = " or ".join(str(list(x)) for x in allowed)
            raise ValueError(f"vllm_is_ratio must have shape {wanted}, got {list(weight.shape)}")
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim() != 0:
        shape = list(num_items_in_batch.shape)
        raise ValueError(f"num_items_in_batch must have shape [] or be a number, got {shape}")


def token_losses(
    log_probs: Tensor,  # [B, L]
    old: Tensor | None,  # [B, L]; None: on-policy
    ref: Tensor | None,  # [B, L], where beta is not 0
    advantages: Tensor,  # [B]
    weight: Tensor | None,  # [B, L], [B, 1] or [B], of the policy term
    inside: Tensor,  # [B, L] bool; log_probs elsewhere are not looked at
    mask: Tensor,  # [B, L], 0 or 1: the tokens a sequence's ratio is the mean of
    options: Options,
    phi: Tensor | None = None,  # [B, 1]; of vespo, the weight in it; None: made here
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss, KL (None where beta is 0) and whether clipped: [B, L], or [B, 1] if of a sequence.

    Nothing is masked yet.
    """
    old = log_probs.detach() if old is None else old
    log_ratio = torch.where(inside, log_probs - old, 0)
    if options.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True)
        log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
    advantage = advantages[:, None]
    if weight is not None and weight.dim() == 1:
        weight = weight[:, None]

    ratio = log_ratio.exp()
    is_clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if options.loss_type in _CLIPPED:
        policy = clipped_policy(log_ratio, advantage, is_clipped, options.terms)
        beyond = policy.clipped_high & (policy.ratio > 1 + options.eps_high)  # and not `delta`
        loss, is_clipped = policy.loss, policy.clipped_low | beyond
    elif options.loss_type == "cispo":
        is_clipped = (ratio > options.eps_high) & (advantage > 0)
        loss = -ratio.detach().clamp(max=options.eps_high) * advantage * log_probs
    elif options.loss_type == "sapo":
        steepness = torch.where(
            advantage > 0, options.sapo_temperature_pos, options.sapo_temperature_neg
        )
        loss = -(steepness * (ratio - 1)).sigmoid() * 4 / steepness * advantage
    else:
        if phi is None:
            phi = _vespo_weight(log_ratio.detach(), weight, advantage, options)
        loss, weight = -phi * advantage * log_probs, None
    if weight is not None:
        loss = loss * weight
    kl = None
    if options.beta != 0:
        kl, _ = kl_term(torch.where(inside, log_probs - ref, 0), "k3")
        kl = kl * ratio if options.use_bias_correction_kl else kl
        loss = loss + options.beta * kl
    return loss, kl, is_clipped


def _vespo_weight(
    log_ratio: Tensor,  # [B, L], 0 outside the mask
    weight: Tensor | None,  # [B, L] or [B, 1]
    advantage: Tensor,  # [B, 1]
    options: Options,
) -> Tensor:
    """w^k e^(rate (1 - w)), [B, 1], w the product of a sequence's ratios and weights."""
    up = advantage >= 0
    k = torch.where(up, options.vespo_k_pos, options.vespo_k_neg)
    rate = torch.where(up, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    low, high = _LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT
    total = log_ratio.clamp(-high, high).sum(-1, keepdim=True)
    if weight is not None:
        total = total + weight.log().clamp(low, high).sum(-1, keepdim=True)
    total = total.clamp(low, high)
    phi = (rate + k * total - rate * total.exp()).exp()
    return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def metrics(mask: Tensor, *values: Tensor | None) -> list[Tensor]:
    """Means over the tokens of `mask` of the values that there are, detached."""
    num_tokens = mask.sum().clamp(min=1)
    masked = [torch.where(mask != 0, x.detach(), 0) for x in values if x is not None]
    return [x.sum() / num_tokens for x in masked]


def reduced(
    loss: Tensor,  # [B, L], 0 outside the mask; luspo also [B, 1], and not masked
    mask: Tensor,  # [B, L]
    loss_type: str,
    max_completion_length: int | None,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """The tokens' losses in one number, 0-dim."""
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
