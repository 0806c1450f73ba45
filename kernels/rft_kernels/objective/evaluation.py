"""The loss of a token and its derivatives, by the backend that serves the call (E4 to E8)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rft_kernels import _dispatch

from . import torch_backend
from .policy_config import SUMS, PolicyConfig
from .tokens import Evaluation, Tokens


def evaluate(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    config: PolicyConfig,
    backend: str,
    cu_seqlens: Tensor | None = None,  # [B + 1], where the ratio is of the sequence
) -> Evaluation:
    """Loss, derivatives and metrics; in Triton two launches."""
    in_triton = _dispatch.resolve_for_tokens(backend, log_probs) == "triton"
    serve = _evaluate_on_device if in_triton else torch_backend.evaluate
    return serve(log_probs, entropy, tokens, config, cu_seqlens)


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
    from .triton_backend import objective_fwd

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
        config.ratio_bounds,
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
