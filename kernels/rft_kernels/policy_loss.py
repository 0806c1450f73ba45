"""Logits to the Prefix-RFT loss: statistics -> selection -> objective -> gradient (E1 to E8).

T rows, V classes. Reads T V elements forward; backward reads and writes the rows that have a
gradient.
"""

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from .objective import (
    DEFAULT_CONFIG,
    PolicyConfig,
    Tokens,
    check_scale,
    check_tokens,
    reduce_loss,
)
from .results import PolicyLoss, TokenStats
from .rows import token_stats
from .selection import FIFTH, check_fraction, select_top_entropy


class Plan(NamedTuple):
    """What is known of the loss before any forward."""

    tokens: Tokens  # its loss_mask holds all that may be in the loss; selection may yet take away
    candidates: Tensor  # [T] prefix tokens among them
    selected: Tensor | None  # [T]; None: to be selected by entropy
    needed: Tensor  # [T] rows whose statistics are wanted
    active: Tensor  # [T] rows that can have a gradient
    sequences: Tensor | None  # cu_seqlens of ratios and advantages
    config: PolicyConfig


def plan_loss(
    like: Tensor,  # [...] float, on the device of all
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    prefix_mask: Tensor | None,
    *,
    config: PolicyConfig,
    fraction: Fraction | float | str,
    cu_seqlens: Tensor | None,
    selected_mask: Tensor | None,
    rollout_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    normalizer: float | Tensor,
    stats: str,
    active_rows: Tensor | None,
) -> Plan:
    """Checks the arguments of the loss and derives which rows matter for what."""
    _check.mask("response_mask", response_mask, like)
    check_scale(config, normalizer)
    _check.one_of("stats", stats, ("all", "active"))
    check_fraction(fraction, like.numel())
    has_target = targets != _check.NO_TARGET
    tokens, sequences = check_tokens(
        like,
        old_log_probs,
        advantages,
        response_mask & has_target,
        prefix_mask,
        cu_seqlens,
        rollout_log_probs,
        ref_log_probs,
        config,
    )
    prefix = torch.zeros_like(tokens.loss_mask) if prefix_mask is None else tokens.prefix_mask
    candidates = tokens.loss_mask & prefix
    if selected_mask is not None:
        _check.mask("selected_mask", selected_mask, like)
        selected = candidates & selected_mask.reshape(-1)
    else:
        selected = candidates if prefix_mask is None else None
    loss_mask = tokens.loss_mask if selected is None else tokens.loss_mask & (~prefix | selected)
    tokens = tokens._replace(loss_mask=loss_mask, prefix_mask=candidates)

    active = loss_mask
    if config.vanishes_without_advantage:
        active = active & (tokens.advantages != 0)
    if active_rows is not None:
        _check.rows("active_rows", active_rows, like)
        listed = torch.zeros_like(active).index_fill(0, active_rows, True)
        active = active & listed
    needed = has_target.reshape(-1)
    if stats == "active":
        needed = active if selected is not None else active | candidates
    return Plan(tokens, candidates, selected, needed, active, sequences, config)


def finish_loss(
    plan: Plan,
    stats: TokenStats,  # [T] each
    shape: torch.Size,
    *,
    normalizer: float | Tensor,
    fraction: Fraction | float | str,
    cu_seqlens: Tensor | None,
    backend: str,
    gradient: tuple[list, ...] | None = None,
) -> PolicyLoss:
    """Selection, where still to be made, and the objective; `gradient`: see `reduce_loss`."""
    tokens, selected = plan.tokens, plan.selected
    if selected is None:
        selected = select_top_entropy(
            stats.entropy.detach(),
            plan.candidates,
            fraction=fraction,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        tokens = tokens._replace(loss_mask=tokens.loss_mask & (~plan.candidates | selected))
    # Rows left out of the statistics have nothing the objective could use.
    tokens = tokens._replace(loss_mask=tokens.loss_mask & plan.needed)
    loss, metrics = reduce_loss(
        *stats, tokens, plan.config, plan.sequences, normalizer, backend, gradient
    )
    held = (x.detach().view(shape) for x in (*stats, selected))
    return PolicyLoss(loss, *held, metrics)


def prefix_rft_loss(
    logits: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    prefix_mask: Tensor | None,
    *,
    normalizer: float | Tensor,
    config: PolicyConfig = DEFAULT_CONFIG,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    fraction: Fraction | float | str = FIFTH,
    cu_seqlens: Tensor | None = None,
    selected_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    stats: str = "all",
    active_rows: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """The clipped policy loss on continuation tokens and the prefix tokens of highest entropy.

        log_probs, entropy = token_stats(logits, targets)
        loss_mask = response_mask, with a target, and, where prefix_mask, selected
        loss = policy_objective(log_probs, ..., loss_mask)

    Args:
        logits: [..., V] float16, bfloat16, float32 or float64; see `token_stats`.
        targets: [...] int, already shifted; -100 = no target.
        old_log_probs, advantages, rollout_log_probs, ref_log_probs, normalizer, config: see
            `policy_objective`.
        response_mask: [...] bool, tokens of the response, those of a prefix included.
        prefix_mask: [...] bool, those forced from the demonstration; None: plain reinforcement.
        softcap, temperature, vocab_size, backend: see `token_stats`.
        fraction: share of the prefix tokens to keep; see `select_top_entropy`.
        cu_seqlens: [B + 1] int: bounds of the sequences; selection is then per sequence, else one
            pool.
        selected_mask: [...] bool, the prefix tokens to keep: then nothing is selected here.
        inplace_backward: the backward writes the gradient over `logits`; see `token_stats`.
        stats: "all": statistics of every row with a target. "active": rows that can have no
            gradient may be skipped: they report 0 and are left out of the metrics.
        active_rows: [N] int64, rows of the flattened tokens outside which the caller knows that
            there is no gradient.
    Returns:
        PolicyLoss.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or missing.
    The loss is differentiable once in `logits`. Deterministic. Reads every row once; the backward
    reads and writes the rows with a gradient.
    """
    _check.tensor("logits", logits)
    shape = logits.shape[:-1]
    _check.tensor("targets", targets, dtypes=_check.INTEGERS, shape=shape, like=logits)
    plan = plan_loss(
        logits.new_empty(()).expand(shape),
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
    found = token_stats(
        logits,
        targets,
        softcap=softcap,
        temperature=temperature,
        row_mask=plan.needed.view(shape) if stats == "active" else None,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    flat = TokenStats(*(x.view(-1) for x in found))
    return finish_loss(
        plan,
        flat,
        shape,
        normalizer=normalizer,
        fraction=fraction,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
