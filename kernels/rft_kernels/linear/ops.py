"""The passes over hidden states as ops of torch, with their backward (E9, E10)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rft_kernels.objective import PolicyConfig, Tokens
from rft_kernels.results import stats_dtype
from rft_kernels.rows import new_stats

from .grads import wanted_results
from .passes import function_pass, grad_pass, policy_pass, stats_pass
from .tiles import make_head

NUM_TENSORS = 4  # that may need a gradient lead every op: hidden, weight, low_rank, bias
_NUM_HEAD = 11  # arguments of make_head, which lead those of every op


@torch.library.custom_op("rft_kernels::linear_token_stats", mutates_args=())
def token_stats_fwd(
    hidden: Tensor,  # [T, D + R]
    weight: Tensor,  # [V, D]
    low_rank: Tensor | None,  # [V, R]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    row_temperature: Tensor | None,  # [T]
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    workspace_bytes: int,
    backend: str,
    valid: Tensor,  # [T]
    active_rows: Tensor | None,  # [N], those that may have a gradient if the caller knows them
    only_active: bool,
    dweight: Tensor | None,  # [V, D], to which the backward adds the weight's gradient
) -> tuple[Tensor, Tensor, Tensor]:
    head = make_head(
        hidden, weight, low_rank, bias, targets, row_temperature, temperature, softcap, vocab_size,
        workspace_bytes, backend,
    )  # fmt: skip
    return stats_pass(head, valid, active_rows, only_active)


@token_stats_fwd.register_fake
def _(hidden, *arguments):
    return new_stats(hidden, len(hidden), arguments[9])


@torch.library.custom_op("rft_kernels::linear_token_stats_bwd", mutates_args=("dweight",))
def token_stats_bwd(
    hidden: Tensor,  # [T, D + R]
    weight: Tensor,  # [V, D]
    low_rank: Tensor | None,  # [V, R]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    row_temperature: Tensor | None,  # [T]
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    workspace_bytes: int,
    backend: str,
    active_rows: Tensor | None,  # [N]
    entropy: Tensor,  # [T]
    saved: Tensor,  # [T, k]
    dlog_probs: Tensor | None,  # [T]
    dentropy: Tensor | None,  # [T]
    needs: Sequence[bool],
    dweight: Tensor | None,  # [V, D], added to; then not among the results
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = make_head(
        hidden, weight, low_rank, bias, targets, row_temperature, temperature, softcap, vocab_size,
        workspace_bytes, backend,
    )  # fmt: skip
    rows = (active_rows, entropy, saved, dlog_probs, dentropy)
    return grad_pass(head, len(weight), *rows, needs, dweight)


def _fake_grads(hidden, weight, low_rank, needs):
    up = (0,) if low_rank is None else low_rank.shape
    shapes = (hidden.shape, weight.shape, up, weight.shape[:1])
    dtype = stats_dtype(hidden.dtype)
    return tuple(
        hidden.new_empty(shape if need else 0, dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )


@token_stats_bwd.register_fake
def _(hidden, weight, low_rank, *arguments):
    *_, needs, dweight = arguments
    return _fake_grads(hidden, weight, low_rank, wanted_results(needs, dweight))


def split_head(arguments: Sequence) -> tuple[Sequence, Sequence]:
    """The arguments of make_head, and the others."""
    return arguments[:_NUM_HEAD], arguments[_NUM_HEAD:]


def setup_context(ctx, inputs, output) -> None:
    *head, valid, active_rows, _, ctx.dweight = inputs
    ctx.options = head[6:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*head[:6], valid, active_rows, *output[1:])


def backward(ctx, dlog_probs, dentropy, _, gradient=token_stats_bwd):
    *tensors, valid, active_rows, entropy, saved = ctx.saved_tensors
    num_others = _NUM_HEAD + 4 - NUM_TENSORS
    if dlog_probs is None and dentropy is None:
        return (None,) * (NUM_TENSORS + num_others)
    scalars = (None if d is None else torch.where(valid, d, 0) for d in (dlog_probs, dentropy))
    needs = list(ctx.needs_input_grad[:NUM_TENSORS])
    found = gradient(
        *tensors, *ctx.options, active_rows, entropy, saved, *scalars, needs, ctx.dweight
    )
    grads = [
        grad.to(x.dtype) if wanted else None
        for grad, x, wanted in zip(found, tensors, wanted_results(needs, ctx.dweight), strict=False)
    ]
    return (*grads, *(None,) * num_others)


token_stats_fwd.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("rft_kernels::linear_policy", mutates_args=())
def policy(
    hidden: Tensor,  # [T, D + R]
    weight: Tensor,  # [V, D]
    low_rank: Tensor | None,  # [V, R]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    row_temperature: Tensor | None,  # [T]
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    workspace_bytes: int,
    backend: str,
    valid: Tensor,  # [T]
    active: Tensor,  # [T]
    active_rows: Tensor | None,  # [N]
    only_active: bool,
    advantages: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    old_log_probs: Tensor | None,  # [T]
    prefix_mask: Tensor | None,  # [T]
    rollout_log_probs: Tensor | None,  # [T]
    ref_log_probs: Tensor | None,  # [T]
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    prefix_clip: Sequence[float],
    importance_cap: float | None,
    entropy_coef: float,
    kl: str,
    kl_coef: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics, and the gradients of the sum of the tokens' losses, from one projection."""
    head = make_head(
        hidden, weight, low_rank, bias, targets, row_temperature, temperature, softcap, vocab_size,
        workspace_bytes, backend,
    )  # fmt: skip
    config = PolicyConfig(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, prefix_clip=prefix_clip,
        importance_cap=importance_cap, entropy_coef=entropy_coef, kl=kl, kl_coef=kl_coef,
    )  # fmt: skip
    tokens = Tokens(
        advantages, loss_mask, old_log_probs, prefix_mask, rollout_log_probs, ref_log_probs
    )
    rows = (valid, active, active_rows, only_active)
    return policy_pass(head, len(weight), *rows, tokens, config, needs)


@policy.register_fake
def _(hidden, weight, low_rank, *arguments):
    stats = new_stats(hidden, len(hidden), arguments[7])
    return *stats[:2], *_fake_grads(hidden, weight, low_rank, arguments[-1])


def policy_of(*arguments) -> tuple[Tensor, ...]:
    """`policy`, with tokens and config as they are."""
    *head_and_rows, tokens, config, needs = arguments
    prefix_clip = {"same": (config.clip_low, config.clip_high), "none": (torch.inf,) * 2}.get(
        config.prefix_clip, config.prefix_clip
    )
    return policy(
        *head_and_rows, *tokens,
        config.clip_low, config.clip_high, config.dual_clip, list(prefix_clip),
        config.importance_cap, config.entropy_coef, config.kl, config.kl_coef, needs,
    )  # fmt: skip


@torch.no_grad()
def function(*arguments) -> tuple[Tensor, ...]:
    """As `policy`, of a loss that is a function of the caller's, which no op of torch can carry."""
    head, rows = split_head(arguments)
    return function_pass(make_head(*head), len(head[1]), *rows)
