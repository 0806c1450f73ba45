"""The passes over hidden states as ops of torch, with their backward (E9, E10)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._bundle import bundled_op
from ..objective import FunctionLoss, Terms, Tokens, evaluate
from ..results import stats_dtype
from ..rows import RowStats, Slopes
from .grads import wanted_results
from .passes import Saved, grad_pass, loss_pass, stats_pass
from .tiles import DIFFERENTIABLE, Head, Projection, Rows, make_head

_TENSORS = (*DIFFERENTIABLE, "targets", "row_temperature")


@bundled_op("linear_token_stats")
def token_stats(
    projection: Projection,
    rows: Rows,
    dweight: Tensor | None,  # [V, D], to which the backward adds the weight's gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_probs, entropy, lse, saved."""
    return stats_pass(make_head(projection), rows)[:-1]


@token_stats.register_fake
def _(projection, rows, dweight):
    return make_head(projection).new_stats()[:-1]


@bundled_op("linear_token_stats_bwd", mutates_args=("dweight",))
def token_stats_bwd(
    projection: Projection,
    listed: Tensor | None,  # [N]
    saved: Saved,
    slopes: Slopes,
    needs: Sequence[bool],
    dweight: Tensor | None,  # [V, D], added to; then not among the results
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return grad_pass(make_head(projection), listed, saved, slopes, needs, dweight)


def _fake_grads(projection: Projection, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    hidden, weight, low_rank = projection.hidden, projection.weight, projection.low_rank
    up = (0,) if low_rank is None else low_rank.shape
    shapes = (hidden.shape, weight.shape, up, weight.shape[:1])
    dtype = stats_dtype(hidden.dtype)
    return tuple(
        hidden.new_empty(shape if need else 0, dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )


@token_stats_bwd.register_fake
def _(projection, listed, saved, slopes, needs, dweight):
    return _fake_grads(projection, wanted_results(needs, dweight))


def setup_context(ctx, inputs, output) -> None:
    projection, rows, ctx.dweight = token_stats.bundle(inputs)
    ctx.projection = projection._replace(**dict.fromkeys(_TENSORS))
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)
    _, entropy, _, saved = output
    ctx.mark_non_differentiable(saved)
    tensors = (getattr(projection, name) for name in _TENSORS)
    ctx.save_for_backward(*tensors, rows.valid, rows.listed, entropy, saved)


def backward(ctx, dlog_probs, dentropy, dlse, _, gradient=token_stats_bwd):
    slopes = Slopes(dlog_probs, dentropy, dlse)
    if all(slope is None for slope in slopes):
        return (None,) * ctx.num_inputs
    *tensors, valid, listed, entropy, saved = ctx.saved_tensors
    projection = ctx.projection._replace(**dict(zip(_TENSORS, tensors, strict=True)))
    slopes = Slopes(*(None if x is None else torch.where(valid, x, 0) for x in slopes))
    needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
    found = gradient(projection, listed, Saved(entropy, saved), slopes, needs, ctx.dweight)
    grads = [
        grad.to(x.dtype) if wanted else None
        for grad, x, wanted in zip(found, tensors, wanted_results(needs, ctx.dweight), strict=False)
    ]
    return (*grads, *(None,) * (ctx.num_inputs - len(grads)))


token_stats.register_autograd(backward, setup_context=setup_context)


@bundled_op("linear_policy")
def policy(
    projection: Projection, rows: Rows, tokens: Tokens, terms: Terms, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_probs, entropy, and the gradients of the sum of the tokens' losses, in one projection."""
    return policy_of(make_head(projection), rows, tokens, terms, needs)


@policy.register_fake
def _(projection, rows, tokens, terms, needs):
    stats = make_head(projection).new_stats()
    return stats.log_probs, stats.entropy, *_fake_grads(projection, needs)


def policy_of(
    head: Head, rows: Rows, tokens: Tokens, terms: Terms, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    def derivatives(tile: Tensor, found: RowStats) -> Slopes:
        result = evaluate(found.log_probs, found.entropy, tokens.at(tile), terms, head.backend)
        return Slopes(result.dlog_probs, result.dentropy)

    log_probs, entropy, _, *grads = loss_pass(head, rows, derivatives, needs)
    return log_probs, entropy, *grads


def function_of(
    head: Head, rows: Rows, loss: FunctionLoss, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """log_probs, entropy, lse, and the gradients of a loss that no op carries: a function."""

    def derivatives(tile: Tensor, found: RowStats) -> Slopes:
        return Slopes(*loss.take(tile, rows.active[tile], *found[:3]))

    with torch.no_grad():
        return loss_pass(head, rows, derivatives, needs, drop=True)
