"""The loss of a token and its derivatives by log-probability and entropy (E4 to E8). O(T).

T tokens, B sequences. All loss mathematics of the package is here, once; the vocabulary-sized code
sees two numbers a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check
from ._tokens import Tokens, check_scale, check_tokens, sequence_of_token, uses_triton
from .policy_config import DEFAULT_CONFIG, PolicyConfig

SUMS = (
    "loss", "num_tokens", "num_prefix", "num_selected", "num_dropped", "clipped_low",
    "clipped_high", "clipped_dual", "ratio_sum", "ratio_max", "approx_kl_sum", "entropy_sum",
    "kl_sum",
)  # fmt: skip
LOG_RATIO_BOUND = 20.0  # e^20 = 5e8: finite in every dtype's sums; beyond it a ratio has no slope


class Evaluation(NamedTuple):
    """The sum over tokens, and its derivatives, 0 outside the loss."""

    loss: Tensor  # 0-dim
    dlog_probs: Tensor  # [T]
    dentropy: Tensor | None  # [T]; None: the loss does not see the entropy
    metrics: dict[str, Tensor]  # 0-dim


def evaluate(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    config: PolicyConfig,
    cu_seqlens: Tensor | None = None,  # [B + 1], where the ratio is of the sequence
) -> Evaluation:
    """Loss, derivatives and metrics; in two launches of Triton where that serves the device."""
    if uses_triton(log_probs):
        return _evaluate_on_device(log_probs, entropy, tokens, config, cu_seqlens)
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

    low, high, prefix_low, prefix_high = (torch.full_like(lp, x) for x in _ratio_bounds(config))
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


@torch.library.custom_op("rft_kernels::policy_objective", mutates_args=())
def _objective(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    advantages: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    old_log_probs: Tensor | None,  # [T]
    prefix_mask: Tensor | None,  # [T]
    rollout_log_probs: Tensor | None,  # [T]
    ref_log_probs: Tensor | None,  # [T]
    cu_seqlens: Tensor | None,  # [B + 1]; given: one ratio a sequence
    clip_range: Sequence[float],
    dual_clip: float | None,
    importance_cap: float | None,
    entropy_coef: float,
    kl: str,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """SUMS, and the derivatives of the loss by `log_probs` and (empty without a bonus) entropy."""
    from .objective_triton import objective_fwd

    return objective_fwd(
        log_probs, entropy, advantages, loss_mask, old_log_probs, prefix_mask, rollout_log_probs,
        ref_log_probs, cu_seqlens, clip_range, dual_clip, importance_cap, entropy_coef, kl, kl_coef,
    )  # fmt: skip


@_objective.register_fake
def _(log_probs, *arguments):
    sums = log_probs.new_empty(len(SUMS), dtype=torch.float32)
    dlog_probs = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    return sums, dlog_probs, log_probs.new_empty(len(log_probs) if arguments[-3] else 0)


def _evaluate_on_device(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    config: PolicyConfig,
    cu_seqlens: Tensor | None,  # [B + 1]
) -> Evaluation:
    entropy_coef = 0.0 if entropy is None else config.entropy_coef
    sums, dlog_probs, dentropy = _objective(
        log_probs,
        entropy,
        *tokens,
        cu_seqlens if config.importance_level == "sequence" else None,
        _ratio_bounds(config),
        config.dual_clip,
        config.importance_cap,
        entropy_coef,
        config.kl if config.uses_kl else "none",
        config.kl_coef,
    )
    metrics = dict(zip(SUMS, sums.to(log_probs.dtype).unbind(), strict=True))
    loss = metrics.pop("loss")
    if entropy is None:
        del metrics["entropy_sum"]
    if not config.uses_kl:
        del metrics["kl_sum"]
    return Evaluation(loss, dlog_probs, dentropy if entropy_coef else None, metrics)


def _ratio_bounds(config: PolicyConfig) -> list[float]:
    """Lowest and highest ratio of ordinary tokens, then of prefix tokens."""
    own = config.clip_low, config.clip_high
    other = {"same": own, "none": (torch.inf, torch.inf)}.get(
        config.prefix_clip, config.prefix_clip
    )
    return [bound for low, high in (own, other) for bound in (1 - low, 1 + high)]


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


class _KnownGradient(torch.autograd.Function):
    """`loss` over `normalizer` as a function of `inputs`; `dinputs` of `loss` are already there."""

    @staticmethod
    def forward(
        ctx, loss: Tensor, normalizer: float | Tensor, sinks: list[Tensor | None], *tensors: Tensor
    ) -> Tensor:
        ctx.normalizer, ctx.sinks = normalizer, sinks
        ctx.dtypes = [x.dtype for x in tensors[: len(sinks)]]
        ctx.save_for_backward(*tensors[len(sinks) :])
        return (loss / normalizer).to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # A graph that is not kept gives its saved tensors away: scaled where they are, no copy.
        keep = (
            torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        )
        scale = (dloss / ctx.normalizer).to(dloss.dtype)
        grads = []
        for x, dtype, sink in zip(ctx.saved_tensors, ctx.dtypes, ctx.sinks, strict=True):
            if sink is not None:
                sink.addcmul_(x, scale)
                grads.append(None)
            else:
                grads.append((x * scale if keep else x.mul_(scale)).to(dtype))
        return None, None, None, *grads, *[None] * len(grads)


def attach_gradient(
    loss: Tensor,
    normalizer: float | Tensor,
    inputs: list[Tensor],
    dinputs: list[Tensor],
    sinks: list[Tensor | None] | None = None,
) -> Tensor:
    """`loss` (0-dim) over `normalizer`, differentiable in `inputs`.

    `dinputs`, the derivatives of `loss`, may be overwritten by the backward. Where there is a sink,
    the backward adds the gradient to it instead of handing it on.
    """
    sinks = [None] * len(inputs) if sinks is None else sinks
    return _KnownGradient.apply(loss, normalizer, sinks, *inputs, *dinputs)


def policy_objective(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    normalizer: float | Tensor,
    config: PolicyConfig = DEFAULT_CONFIG,
    entropy: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss, its entropy and KL terms, over `normalizer`.

        loss = sum max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) / normalizer
               - entropy_coef sum H / normalizer + kl_coef sum kl / normalizer

    Args:
        log_probs: [...] float, of the current policy, nats.
        old_log_probs: [...] float, before the update. None: on-policy, the ratio is exactly 1 and
            the gradient -A.
        advantages: [...]; or [B], one a sequence, with `cu_seqlens` or if `log_probs` is [B, L].
        loss_mask: [...] bool; whatever stands elsewhere (NaN too) has no part in anything.
        normalizer: above 0; a number or 0-dim tensor: num_rollouts * max_response_length of the
            mini-batch.
        config: the terms of the loss.
        entropy: [...] nats; needed where config.entropy_coef is not 0.
        prefix_mask: [...] bool: prefix tokens, which may be clipped apart and are never
            importance-weighted.
        cu_seqlens: [B + 1] int, 0 to T, bounds of the sequences of the flattened tokens.
        rollout_log_probs: [...] as the engine reports; read where config.importance_cap is set. A
            token (not of a prefix) where it is not finite leaves the loss, and is counted.
        ref_log_probs: [...] of the reference; read where a KL term is configured.
    Returns:
        loss: 0-dim, dtype of `log_probs`.
        metrics: 0-dim tensors of that dtype, sums over loss tokens: num_tokens; num_prefix (of
            `prefix_mask`, in the loss or not); num_selected (prefix tokens in the loss);
            clipped_low, clipped_high, clipped_dual (tokens without a slope for it); ratio_sum;
            approx_kl_sum (of r - 1 - log r); entropy_sum; kl_sum where there is a KL term;
            num_dropped (rollout log-prob not finite); and ratio_max, a maximum, not a sum.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or missing.
    Differentiable once in `log_probs` and `entropy`. Deterministic. The log-ratio is clamped to
    +-LOG_RATIO_BOUND before exp.
    """
    _check.tensor("log_probs", log_probs)
    check_scale(config, normalizer)
    if entropy is not None:
        _check.tensor("entropy", entropy, shape=log_probs.shape, like=log_probs)
    elif config.entropy_coef:
        raise ValueError("entropy must be given, as config.entropy_coef is not 0")
    tokens, cu_seqlens = check_tokens(
        log_probs, old_log_probs, advantages, loss_mask, prefix_mask, cu_seqlens, rollout_log_probs,
        ref_log_probs, config,
    )  # fmt: skip
    return reduce_loss(log_probs, entropy, tokens, config, cu_seqlens, normalizer)


def reduce_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    tokens: Tokens,
    config: PolicyConfig,
    cu_seqlens: Tensor | None,
    normalizer: float | Tensor,
    gradient: tuple[list, ...] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the tokens' losses over `normalizer`, differentiable, and the metrics.

    `gradient`: inputs, the gradients of the sum by them and their sinks (see `attach_gradient`),
    where these are known already; else the inputs are `log_probs` and `entropy`.
    """
    log_probs = log_probs.reshape(-1)
    inputs = [log_probs] if entropy is None else [log_probs, entropy.reshape(-1)]
    held = None if entropy is None else inputs[1].detach()
    result = evaluate(log_probs.detach(), held, tokens, config, cu_seqlens)
    if gradient is None:
        derivatives = [x for x in (result.dlog_probs, result.dentropy) if x is not None]
        gradient = inputs[: len(derivatives)], derivatives
    normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    return attach_gradient(result.loss, normalizer, *gradient), result.metrics
