"""Hidden states to statistics or loss: the logits exist a tile of rows at a time (E9, E10).

T rows, V classes, D hidden size, a the share of rows with a gradient. GEMM work, in units of 2 T V
D flops: statistics 1; loss and gradient 1 + 2a in one pass, where the derivatives of a row need
nothing from other rows, and 1 + 3a in two passes. Vocabulary-sized temporaries: `workspace_bytes`.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _check
from ..objective import (
    DEFAULT_CONFIG,
    FunctionLoss,
    LossFn,
    PolicyConfig,
    attach_gradient,
    check_function,
)
from ..policy_loss import finish_loss, plan_loss
from ..results import PolicyLoss, TokenStats
from ..selection import FIFTH
from . import ops
from .inputs import check_dweight, check_inputs
from .tiles import DIFFERENTIABLE, Projection, Rows, counts_rows, make_head


def _served_by(shard: Any) -> tuple[Callable, Callable, Callable]:
    """Statistics, a policy's loss and a head: of one rank, or over those that share the classes."""
    if shard is None:
        return ops.token_stats, ops.policy, make_head
    from . import vocab_parallel as over

    return tuple(partial(f, shard) for f in (over.token_stats, over.policy, over.make_sharded_head))


def _needs(projection: Projection) -> list[bool]:
    """Which of the inputs want a gradient."""
    inputs = projection[: len(DIFFERENTIABLE)]
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def _known_gradient(
    projection: Projection, dinputs: list[Tensor], needs: list[bool], dweight: Tensor | None
) -> tuple[list, ...]:
    """Inputs that want a gradient, it, and where it is to go, as `attach_gradient` takes them."""
    sinks = [dweight if name == "weight" else None for name in DIFFERENTIABLE]
    chosen = [i for i, need in enumerate(needs) if need]
    return tuple([part[i] for i in chosen] for part in (projection, dinputs, sinks))


def linear_token_stats(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of hidden @ lm_head_weight.T, which never exists whole.

        logits = hidden @ lm_head_weight.T + inner @ up.T + bias
        softcap c: logits = c tanh(logits / c)

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        lm_head_weight: [V, D] of the same dtype.
        targets: [...] int64 or int32, already shifted; -100 = no target.
        bias: [V] of the same dtype.
        low_rank: the pair inner [..., R], up [V, R] of the same dtype, as a LoRA adapter of the
            head brings it; neither a second [V, D] matrix nor its gradient is formed.
        softcap: above 0, in units of the logits, before the temperature.
        workspace_bytes: bound of the vocabulary-sized temporaries, in bytes; five rows of logits at
            least. No more is used than makes it faster.
        temperature, row_mask, vocab_size, backend: see `token_stats`; columns from `vocab_size` on
            are not even projected.
        process_group: `lm_head_weight`, and what comes by classes beside it, are this rank's part
            of them, in the order of the group's ranks; all else is the same on all ranks, and so
            are the results. `vocab_size` counts the classes of all. A weight that is a DTensor
            placed Shard(0) says as much by itself. Not under torch.compile.
    Returns:
        TokenStats of shape [...]; rows without a target are 0.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    Both outputs are differentiable once in `hidden`, `lm_head_weight`, `bias` and `low_rank`; the
    backward projects again, and only (on a CPU) rows whose incoming gradients are not both zero.
    Sums are float32 (float64 for float64). Deterministic.
    """
    projection, valid, shard = check_inputs(
        hidden,
        lm_head_weight,
        low_rank,
        bias,
        targets,
        temperature,
        softcap,
        vocab_size,
        workspace_bytes,
        backend,
        process_group,
        row_mask,
    )
    stats_op, *_ = _served_by(shard)
    rows = Rows(valid, valid, listed=None, only_active=False)
    log_probs, entropy, _ = stats_op(projection, rows, None)
    return TokenStats(log_probs.view(targets.shape), entropy.view(targets.shape).clone())


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
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    stats: str = "all",
    active_rows: Tensor | None = None,
    accumulate_dweight: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """`prefix_rft_loss` of hidden @ lm_head_weight.T, which never exists whole.

    Args:
        hidden, lm_head_weight, targets, bias, low_rank, softcap, workspace_bytes, temperature,
            vocab_size, process_group, backend: see `linear_token_stats`.
        old_log_probs, advantages, response_mask, prefix_mask, normalizer, config, fraction,
            cu_seqlens, selected_mask, rollout_log_probs, ref_log_probs, stats, active_rows: see
            `prefix_rft_loss`; `active_rows` holds each row once. On a CPU the active rows are found
            here anyway.
        accumulate_dweight: [V, D] float32 (float64 for float64): the backward adds the gradient of
            `lm_head_weight` to it, times the incoming gradient of the loss, unrounded, and hands
            none on. In two passes no other such buffer exists.
    Returns:
        PolicyLoss.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or missing.
    The loss is differentiable once in `hidden`, `lm_head_weight`, `bias` and `low_rank`; one that
    needs no gradient costs none. Where no row's derivatives need another row's forward (nothing to
    select, ratio of the token), they are computed in the forward, from one projection, and only
    scaled by the backward; otherwise the backward projects the active rows again. Deterministic.
    """
    projection, _, shard = check_inputs(
        hidden,
        lm_head_weight,
        low_rank,
        bias,
        targets,
        temperature,
        softcap,
        vocab_size,
        workspace_bytes,
        backend,
        process_group,
    )
    check_dweight(accumulate_dweight, projection.weight)
    shape = hidden.shape[:-1]
    plan = plan_loss(
        hidden.new_empty(()).expand(shape),
        targets,
        old_log_probs,
        advantages,
        response_mask,
        prefix_mask,
        config=config,
        fraction=fraction,
        cu_seqlens=cu_seqlens,
        selected_mask=selected_mask,
        rollout_log_probs=rollout_log_probs,
        ref_log_probs=ref_log_probs,
        normalizer=normalizer,
        stats=stats,
        active_rows=active_rows,
    )
    known_rows = plan.selected is not None
    rows = Rows(plan.needed, plan.active, active_rows, stats == "active" and known_rows)
    stats_op, policy_op, _ = _served_by(shard)
    needs, gradient = _needs(projection), None
    if known_rows and config.depends_on_row_alone and any(needs):
        detached = (x.detach() if isinstance(x, Tensor) else x for x in projection)
        log_probs, entropy, *dinputs = policy_op(
            Projection(*detached), rows, plan.tokens, config.terms, needs
        )
        gradient = _known_gradient(projection, dinputs, needs, accumulate_dweight)
    else:
        log_probs, entropy, _ = stats_op(projection, rows, accumulate_dweight)
        entropy = entropy.clone()  # its own is saved for the backward
    return finish_loss(
        plan,
        TokenStats(log_probs, entropy),
        shape,
        normalizer=normalizer,
        fraction=fraction,
        cu_seqlens=cu_seqlens,
        backend=backend,
        gradient=gradient,
    )


def linear_token_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    tokens: tuple[Tensor, ...] = (),
    mask: Tensor | None = None,
    normalizer: float | Tensor,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    workspace_bytes: int = 2**30,
    accumulate_dweight: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
    stats: str = "all",
    active_rows: Tensor | None = None,
    check: bool = False,
) -> PolicyLoss:
    """`token_loss` of hidden @ lm_head_weight.T, which never exists whole.

    Args:
        hidden, lm_head_weight, targets, bias, low_rank, softcap, temperature, vocab_size,
            workspace_bytes, process_group, backend: see `linear_token_stats`.
        loss_fn, tokens, mask, normalizer, check: see `token_loss`; the function is called with a
            tile of rows at a time, and on a CPU with rows of `mask` alone.
        accumulate_dweight: see `linear_prefix_rft_loss`.
        stats: "all": statistics of every row with a target. "active": rows outside `mask` or
            `active_rows` report 0 and are left out of loss and metrics.
        active_rows: [N] int64, rows of the flattened tokens outside which the caller knows that
            there is no gradient, each once.
    Returns:
        PolicyLoss, as `token_loss`.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or missing;
            `loss_fn` gives something else than [n], or with `check` looks across rows.
    The loss is differentiable once in `hidden`, `lm_head_weight`, `bias` and `low_rank`: from one
    projection, in the forward, which the backward scales. On a CPU rows whose two derivatives are
    0 have no part in the products of the gradients. Deterministic if `loss_fn` is. Not under
    torch.compile(fullgraph=True).
    """
    projection, valid, shard = check_inputs(
        hidden,
        lm_head_weight,
        low_rank,
        bias,
        targets,
        temperature,
        softcap,
        vocab_size,
        workspace_bytes,
        backend,
        process_group,
    )
    check_dweight(accumulate_dweight, projection.weight)
    shape = hidden.shape[:-1]
    like = hidden.new_empty(()).expand(shape)
    tokens, in_loss = check_function(loss_fn, tokens, mask, normalizer, like)
    _check.one_of("stats", stats, ("all", "active"))
    in_loss = valid if in_loss is None else in_loss & valid
    active = in_loss
    if active_rows is not None:
        _check.rows("active_rows", active_rows, like)
        active = active & torch.zeros_like(active).index_fill(0, active_rows, True)
    only_active = stats == "active"
    rows = Rows(active if only_active else valid, active, active_rows, only_active)
    needs = _needs(projection)
    loss = FunctionLoss(loss_fn, tokens, check=check)
    *_, new_head = _served_by(shard)
    log_probs, entropy, *dinputs = ops.function_of(new_head(projection), rows, loss, needs)
    if active_rows is not None and not only_active:
        rest = in_loss & ~active
        others = rest.nonzero().squeeze(-1) if counts_rows(rest.device) else slice(None)
        loss.take(others, rest[others], log_probs[others], entropy[others])
    total, metrics = loss.finish(log_probs)
    gradient = _known_gradient(projection, dinputs, needs, accumulate_dweight)
    total = attach_gradient(total, normalizer, *gradient)
    return PolicyLoss(total, log_probs.view(shape), entropy.view(shape), None, metrics)
