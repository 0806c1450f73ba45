"""The passes over hidden states as ops of torch, with their backward (E9, E10)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._bundle import bundled_op
from ..objective import FunctionLoss, Terms, Tokens, evaluate
from ..results import stats_dtype
from ..rows import new_stats
from .grads import wanted_results
from .passes import Saved, Slopes, grad_pass, loss_pass, stats_pass
from .tiles import DIFFERENTIABLE, Head, Projection, Rows, make_head

_TENSORS = (*DIFFERENTIABLE, "targets", "row_temperature")


@bundled_op("linear_token_stats")
def token_stats(
    projection: Projection,
    rows: Rows,
    dweight: Tensor | None,  # [V, D], to which the backward adds the weight's gradient
) -> tuple[Tensor, Tensor, Tensor]:
    return stats_pass(make_head(projection), rows)


@token_stats.register_fake
def _(projection, rows, dweight):
    return new_stats(projection.hidden, len(projection.hidden), projection.backend)


@bundled_op("linear_token_stats_bwd", mutates_args=("dweight",))
def token_stats_bwd(
    projection: Projection,
    listed: Tensor | None,  # [N]
    saved: Saved,
    needs: Sequence[bool],
    dweight: Tensor | None,  # [V, D], added to; then not among the results
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return grad_pass(make_head(projection), listed, saved, needs, dweight)


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
def _(projection, listed, saved, needs, dweight):
    return _fake_grads(projection, wanted_results(needs, dweight))


def setup_context(ctx, inputs, output) -> None:
    projection, rows, ctx.dweight = token_stats.bundle(inputs)
    ctx.projection = projection._replace(**dict.fromkeys(_TENSORS))
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    tensors = (getattr(projection, name) for name in _TENSORS)
    ctx.save_for_backward(*tensors, rows.valid, rows.listed, *output[1:])


def backward(ctx, dlog_probs, dentropy, _, gradient=token_stats_bwd):
    if dlog_probs is None and dentropy is None:
        return (None,) * ctx.num_inputs
    *tensors, valid, listed, entropy, saved = ctx.saved_tensors
    projection = ctx.projection._replace(**dict(zip(_TENSORS, tensors, strict=True)))
    scalars = (None if d is None else torch.where(valid, d, 0) for d in (dlog_probs, dentropy))
    needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
    found = gradient(projection, listed, Saved(entropy, saved, *scalars), needs, ctx.dweight)
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
    """Statistics, and the gradients of the sum of the tokens' losses, from one projection."""
    return policy_of(make_head(projection), rows, tokens, terms, needs)


@policy.register_fake
def _(projection, rows, tokens, terms, needs):
    stats = new_stats(projection.hidden, len(projection.hidden), projection.backend)
    return *stats[:2], *_fake_grads(projection, needs)


def policy_of(
    head: Head, rows: Rows, tokens: Tokens, terms: Terms, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    def derivatives(tile: Tensor, log_probs: Tensor, entropy: Tensor) -> Slopes:
        result = evaluate(log_probs, entropy, tokens.at(tile), terms, head.backend)
        return result.dlog_probs, result.dentropy

    return loss_pass(head, rows, derivatives, needs)


def function_of(
    head: Head, rows: Rows, loss: FunctionLoss, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """As `policy_of`, of a loss that is a function of the caller's, which no op can carry."""

    def derivatives(tile: Tensor, log_probs: Tensor, entropy: Tensor) -> Slopes:
        return loss.take(tile, rows.active[tile], log_probs, entropy)

    with torch.no_grad():
        return loss_pass(head, rows, derivatives, needs, drop=True)
