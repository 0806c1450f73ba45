"""The loss of a token and its derivatives, by the backend that serves the call (E4 to E8)."""

import torch
from torch import Tensor

from .. import _dispatch
from .._bundle import bundled_op
from . import torch_backend
from .policy_config import SUMS, Terms
from .tokens import Evaluation, Tokens


def evaluate(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    terms: Terms,
    backend: str,
    cu_seqlens: Tensor | None = None,  # [B + 1]; given: one ratio a sequence
) -> Evaluation:
    """Loss, derivatives and metrics; in Triton two launches."""
    in_triton = _dispatch.resolve_for_tokens(backend, log_probs) == "triton"
    serve = _evaluate_in_triton if in_triton else torch_backend.evaluate
    return serve(log_probs, entropy, tokens, terms, cu_seqlens)


@bundled_op("policy_objective")
def _objective(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    terms: Terms,
    cu_seqlens: Tensor | None,  # [B + 1]; given: one ratio a sequence
) -> tuple[Tensor, Tensor, Tensor]:
    """SUMS, and the derivatives of the loss by `log_probs` and (empty without a bonus) entropy."""
    from .triton_backend import objective_fwd

    return objective_fwd(log_probs, entropy, tokens, terms, cu_seqlens)


@_objective.register_fake
def _(log_probs, entropy, tokens, terms, cu_seqlens):
    sums = log_probs.new_empty(len(SUMS), dtype=torch.float32)
    dlog_probs = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    return sums, dlog_probs, log_probs.new_empty(len(log_probs) if terms.entropy_coef else 0)


def _evaluate_in_triton(
    log_probs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    tokens: Tokens,
    terms: Terms,
    cu_seqlens: Tensor | None,  # [B + 1]
) -> Evaluation:
    if entropy is None:
        terms = terms._replace(entropy_coef=0.0)
    sums, dlog_probs, dentropy = _objective(log_probs, entropy, tokens, terms, cu_seqlens)
    metrics = dict(zip(SUMS, sums.to(log_probs.dtype).unbind(), strict=True))
    loss = metrics.pop("loss")
    if entropy is None:
        del metrics["entropy_sum"]
    if terms.kl == "none":
        del metrics["kl_sum"]
    return Evaluation(loss, dlog_probs, dentropy if terms.entropy_coef else None, metrics)
