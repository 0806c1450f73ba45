"""Hidden states to statistics or loss: the logits exist a tile of rows at a time (E9, E10).

T rows, V classes, D hidden size, a the share of rows with a gradient. GEMM work, in units of 2 T V
D flops: statistics 1; loss and gradient 1 + 2a in one pass, where the derivatives of a row need
nothing from other rows, and 1 + 3a in two passes. Vocabulary-sized temporaries: `workspace_bytes`.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from . import _backends
from ._head import Grads, check_head, make_head, split_rows
from ._tokens import Tokens
from .objective import evaluate
from .policy_config import DEFAULT_CONFIG, PolicyConfig
from .policy_loss import PolicyLoss, finish_loss, plan_loss
from .selection import FIFTH
from .token_stats import TokenStats
from .torch_backend import at, stats_dtype

_NUM_HEAD = 10  # arguments of make_head, which lead those of each op


@torch.library.custom_op("rft_kernels::linear_token_stats", mutates_args=())
def _linear_token_stats_fwd(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
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
) -> tuple[Tensor, Tensor, Tensor]:
    head = make_head(
        hidden, weight, bias, targets, row_temperature, temperature, softcap, vocab_size,
        workspace_bytes, backend,
    )  # fmt: skip
    rows, _ = split_rows(valid, valid, active_rows if only_active else None, only_active=True)
    out = head.new_stats()
    for tile, logits in head.tiles(rows, head.new_tile()):
        head.stats(tile, logits, valid, out)
    return out


@_linear_token_stats_fwd.register_fake
def _(hidden, *arguments):
    return _backends.new_stats(hidden, len(hidden), arguments[8])


@torch.library.custom_op("rft_kernels::linear_token_stats_bwd", mutates_args=())
def _linear_token_stats_bwd(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
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
) -> tuple[Tensor, Tensor, Tensor]:
    head = make_head(
        hidden, weight, bias, targets, row_temperature, temperature, softcap, vocab_size,
        workspace_bytes, backend,
    )  # fmt: skip
    active = torch.zeros_like(entropy, dtype=torch.bool)
    for scalar in (dlog_probs, dentropy):
        if scalar is not None:
            active = active | (scalar != 0)
    rows, _ = split_rows(active, active, active_rows, only_active=True)
    grads = Grads(head, needs, len(weight))
    for tile, logits in head.tiles(rows, head.new_tile()):
        head.grad(tile, logits, *(at(x, tile) for x in (entropy, saved, dlog_probs, dentropy)))
        grads.add(tile, logits)
    return grads.hidden, grads.weight, grads.bias


def _fake_grads(hidden, weight, needs):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtype = stats_dtype(hidden.dtype)
    return tuple(
        hidden.new_empty(shape if need else 0, dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )


@_linear_token_stats_bwd.register_fake
def _(hidden, weight, *arguments):
    return _fake_grads(hidden, weight, arguments[-1])


def _setup_context(ctx, inputs, output) -> None:
    *head, valid, active_rows, _ = inputs
    ctx.options = head[5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*head[:5], valid, active_rows, *output[1:])


def _backward(ctx, dlog_probs, dentropy, _):
    *tensors, valid, active_rows, entropy, saved = ctx.saved_tensors
    num_inputs = _NUM_HEAD + 3
    if dlog_probs is None and dentropy is None:
        return (None,) * num_inputs
    scalars = (None if d is None else torch.where(valid, d, 0) for d in (dlog_probs, dentropy))
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_token_stats_bwd(
        *tensors, *ctx.options, active_rows, entropy, saved, *scalars, needs
    )
    grads = [
        grad.to(x.dtype) if need else None
        for grad, x, need in zip(grads, tensors, needs + [False] * 2, strict=False)
    ]
    return (*grads, *(None,) * (num_inputs - 3))


_linear_token_stats_fwd.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("rft_kernels::linear_policy", mutates_args=())
def _linear_policy(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics, and the gradients of the sum of the tokens' losses, from one projection."""
    head = make_head(
        hidden, weight, bias, targets, row_temperature, temperature, softcap, vocab_size,
        workspace_bytes, backend,
    )  # fmt: skip
    config = PolicyConfig(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, prefix_clip=prefix_clip,
        importance_cap=importance_cap, entropy_coef=entropy_coef, kl=kl, kl_coef=kl_coef,
    )  # fmt: skip
    tokens = Tokens(
        advantages, loss_mask, old_log_probs, prefix_mask, rollout_log_probs, ref_log_probs
    )
    rows, others = split_rows(valid, active, active_rows, only_active)
    out = log_probs, entropy, saved = head.new_stats()
    grads = Grads(head, needs, len(weight))
    buffer = head.new_tile()
    for tile, logits in head.tiles(rows, buffer):
        head.stats(tile, logits, valid, out)
        h = entropy[tile]
        result = evaluate(log_probs[tile], h, tokens.at(tile), config)
        head.grad(tile, logits, h, saved[tile], result.dlog_probs, result.dentropy)
        grads.add(tile, logits)
    for tile, logits in head.tiles(others, buffer):
        head.stats(tile, logits, valid, out)
    return log_probs, entropy, grads.hidden, grads.weight, grads.bias


@_linear_policy.register_fake
def _(hidden, weight, *arguments):
    stats = _backends.new_stats(hidden, len(hidden), arguments[7])
    return *stats[:2], *_fake_grads(hidden, weight, arguments[-1])


def linear_token_stats(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of hidden @ lm_head_weight.T, which never exists whole.

        logits = hidden @ lm_head_weight.T + bias,   softcap c: logits = c tanh(logits / c)

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        lm_head_weight: [V, D] of the same dtype.
        targets: [...] int64 or int32, already shifted; -100 = no target.
        bias: [V] of the same dtype.
        softcap: above 0, in units of the logits, before the temperature.
        workspace_bytes: bound of the vocabulary-sized temporaries, in bytes; five rows of logits at
            least. More than pays is not used.
        temperature, row_mask, vocab_size, backend: see `token_stats`; columns from `vocab_size` on
            are not even projected.
    Returns:
        TokenStats of shape [...]; rows without a target are 0.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    Both outputs are differentiable once in `hidden`, `lm_head_weight` and `bias`; the backward
    projects again, and only (on a CPU) rows whose incoming gradients are not both zero. Sums are
    float32 (float64 for float64). Deterministic.
    """
    arguments, valid = check_head(
        hidden, lm_head_weight, bias, targets, temperature, softcap, vocab_size, workspace_bytes,
        backend, row_mask,
    )  # fmt: skip
    log_probs, entropy, _ = _linear_token_stats_fwd(*arguments, valid, None, False)
    return TokenStats(log_probs.view(targets.shape), entropy.view(targets.shape))


def linear_prefix_rft_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    prefix_mask: Tensor | None,
    *,
    normalizer: float | Tensor,
    config: PolicyConfig = DEFAULT_CONFIG,
    temperature: float | Tensor = 1.0,
    fraction: Fraction | float | str = FIFTH,
    cu_seqlens: Tensor | None = None,
    selected_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    stats: str = "all",
    active_rows: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """`prefix_rft_loss` of hidden @ lm_head_weight.T, which never exists whole.

    Args:
        hidden, lm_head_weight, targets, bias, softcap, workspace_bytes, temperature, vocab_size,
        backend:
            see `linear_token_stats`.
        old_log_probs, advantages, response_mask, prefix_mask, normalizer, config, fraction,
        cu_seqlens,
            selected_mask, rollout_log_probs, ref_log_probs, stats, active_rows: see
                `prefix_rft_loss`;
            `active_rows` holds each row once. On a CPU the active rows are found here anyway.
    Returns:
        PolicyLoss.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or missing.
    The loss is differentiable once in `hidden`, `lm_head_weight` and `bias`; one that needs no
    gradient costs none. Where no row's derivatives need another row's forward (nothing to select,
    ratio of the token), they are computed in the forward, from one projection, and only scaled by
    the backward; otherwise the backward projects the active rows again. Deterministic.
    """
    arguments, _ = check_head(
        hidden, lm_head_weight, bias, targets, temperature, softcap, vocab_size, workspace_bytes,
        backend, None,
    )  # fmt: skip
    shape = hidden.shape[:-1]
    plan = plan_loss(
        hidden.new_empty(()).expand(shape), targets, old_log_probs, advantages, response_mask,
        prefix_mask, config=config, fraction=fraction, cu_seqlens=cu_seqlens,
        selected_mask=selected_mask, rollout_log_probs=rollout_log_probs,
        ref_log_probs=ref_log_probs, normalizer=normalizer, stats=stats, active_rows=active_rows,
    )  # fmt: skip
    known_rows = plan.selected is not None
    only_active = stats == "active" and known_rows
    needs = [x is not None and x.requires_grad for x in arguments[:3]]
    gradient = None
    if known_rows and config.depends_on_row_alone and any(needs) and torch.is_grad_enabled():
        log_probs, entropy, *dinputs = _linear_policy(
            *(x.detach() if isinstance(x, Tensor) else x for x in arguments),
            plan.needed, plan.active, active_rows, only_active,
            *plan.tokens, *_config_arguments(config), needs,
        )  # fmt: skip
        chosen = [i for i, need in enumerate(needs) if need]
        gradient = [arguments[i] for i in chosen], [dinputs[i] for i in chosen]
    else:
        log_probs, entropy, _ = _linear_token_stats_fwd(
            *arguments, plan.needed, active_rows, only_active
        )
    return finish_loss(
        plan, TokenStats(log_probs, entropy), shape, normalizer=normalizer, fraction=fraction,
        cu_seqlens=cu_seqlens, gradient=gradient,
    )  # fmt: skip


def _config_arguments(config: PolicyConfig) -> tuple:
    """The token-level terms of a config as an op takes them."""
    prefix_clip = {"same": (config.clip_low, config.clip_high), "none": (torch.inf,) * 2}.get(
        config.prefix_clip, config.prefix_clip
    )
    return (
        config.clip_low, config.clip_high, config.dual_clip, list(prefix_clip),
        config.importance_cap, config.entropy_coef, config.kl, config.kl_coef,
    )  # fmt: skip
