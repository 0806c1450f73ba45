"""Hidden states to a loss: the logits exist a tile of rows at a time (E9, E10).

T rows, V classes, D hidden size, a the share of rows with a gradient. GEMM work, in units of 2 T V
D flops: statistics 1; loss and gradient 1 + 2a in one pass, where the derivatives of a row need
nothing from other rows, and 1 + 3a in two passes. Vocabulary-sized temporaries: `workspace_bytes`.
"""

from fractions import Fraction

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
from .inputs import check_dweight, check_inputs, served_by
from .tiles import DIFFERENTIABLE, Projection, Rows, counts_rows


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
        hidden, lm_head_weight, low_rank, bias, targets, temperature, softcap, vocab_size,
        workspace_bytes, backend, process_group,
    )  # fmt: skip
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
    stats_op, policy_op, _ = served_by(shard)
    needs, gradient = _needs(projection), None
    if known_rows and config.depends_on_row_alone and any(needs):
        detached = (x.detach() if isinstance(x, Tensor) else x for x in projection)
        log_probs, entropy, *dinputs = policy_op(
            Projection(*detached), rows, plan.tokens, config.terms, needs
        )
        gradient = _known_gradient(projection, dinputs, needs, accumulate_dweight)
    else:
        log_probs, entropy, *_ = stats_op(projection, rows, accumulate_dweight)
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
    with_lse: bool = False,
    check: bool = False,
) -> PolicyLoss:
    """`token_loss` of hidden @ lm_head_weight.T, which never exists whole.

    Args:
        hidden, lm_head_weight, targets, bias, low_rank, softcap, temperature, vocab_size,
            workspace_bytes, process_group, backend: see `linear_token_stats`.
        loss_fn, tokens, mask, normalizer, with_lse, check: see `token_loss`; the function is called
            with a tile of rows at a time, and on a CPU with rows of `mask` alone.
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
    projection, in the forward, which the backward scales. On a CPU rows whose derivatives are all
    0 have no part in the products of the gradients. Deterministic if `loss_fn` is. Not under
    torch.compile(fullgraph=True).
    """
    projection, valid, shard = check_inputs(
        hidden, lm_head_weight, low_rank, bias, targets, temperature, softcap, vocab_size,
        workspace_bytes, backend, process_group,
    )  # fmt: skip
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
    loss = FunctionLoss(loss_fn, tokens, with_lse=with_lse, check=check)
    *_, new_head = served_by(shard)
    log_probs, entropy, lse, *dinputs = ops.function_of(new_head(projection), rows, loss, needs)
    if active_rows is not None and not only_active:
        rest = in_loss & ~active
        others = rest.nonzero().squeeze(-1) if counts_rows(rest.device) else slice(None)
        loss.take(others, rest[others], *(x[others] for x in (log_probs, entropy, lse)))
    total, metrics = loss.finish(log_probs)
    gradient = _known_gradient(projection, dinputs, needs, accumulate_dweight)
    total = attach_gradient(total, normalizer, *gradient)
    return PolicyLoss(total, log_probs.view(shape), entropy.view(shape), None, metrics)
