"""From log-probabilities to the policy loss and its metrics. O(T)."""

from torch import Tensor

from .. import _check
from .evaluation import evaluate
from .known_gradient import attach_gradient
from .policy_config import DEFAULT_CONFIG, PolicyConfig
from .tokens import Tokens, check_scale, check_tokens


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
    backend: str = "auto",
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
        backend: see `token_stats`; float64 is served by torch.
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
        log_probs,
        old_log_probs,
        advantages,
        loss_mask,
        prefix_mask,
        cu_seqlens,
        rollout_log_probs,
        ref_log_probs,
        config,
    )
    return reduce_loss(log_probs, entropy, tokens, config, cu_seqlens, normalizer, backend)


def reduce_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    tokens: Tokens,
    config: PolicyConfig,
    cu_seqlens: Tensor | None,
    normalizer: float | Tensor,
    backend: str,
    gradient: tuple[list, ...] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the tokens' losses over `normalizer`, differentiable, and the metrics.

    `gradient`: inputs, the gradients of the sum by them and their sinks (see `attach_gradient`),
    where these are known already; else the inputs are `log_probs` and `entropy`.
    """
    log_probs = log_probs.reshape(-1)
    inputs = [log_probs] if entropy is None else [log_probs, entropy.reshape(-1)]
    held = None if entropy is None else inputs[1].detach()
    if config.importance_level == "token":
        cu_seqlens = None
    result = evaluate(log_probs.detach(), held, tokens, config.terms, backend, cu_seqlens)
    if gradient is None:
        derivatives = [x for x in (result.dlog_probs, result.dentropy) if x is not None]
        gradient = inputs[: len(derivatives)], derivatives
    return attach_gradient(result.loss, normalizer, *gradient), result.metrics
