"""A loss whose derivatives are there before the backward asks for them."""

import torch
from torch import Tensor


class _KnownGradient(torch.autograd.Function):
    """`loss` over `normalizer` as a function of `inputs`; `dinputs` of `loss` are already there."""

    @staticmethod
    def forward(
        ctx, loss: Tensor, normalizer: float | Tensor, sinks: list[Tensor | None], *tensors: Tensor
    ) -> Tensor:
        ctx.normalizer, ctx.sinks = normalizer, sinks
        ctx.dtypes = [x.dtype for x in tensors[: len(sinks)]]
        ctx.save_for_backward(*tensors[len(sinks) :])
        return (loss / normalizer).to(loss.dtype)

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the loss is differentiable once: create_graph must be False")
        # A graph that is not kept gives its saved tensors away: scaled where they are, no copy.
        keep = (
            torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        )
        scale = (dloss / ctx.normalizer).to(dloss.dtype)
        grads = []
        for x, dtype, sink in zip(ctx.saved_tensors, ctx.dtypes, ctx.sinks, strict=True):
            if sink is not None:
                sink.addcmul_(x, scale)
                grads.append(None)
            else:
                grads.append((x * scale if keep else x.mul_(scale)).to(dtype))
        return None, None, None, *grads, *[None] * len(grads)


def attach_gradient(
    loss: Tensor,
    normalizer: float | Tensor,
    inputs: list[Tensor],
    dinputs: list[Tensor],
    sinks: list[Tensor | None] | None = None,
) -> Tensor:
    """`loss` (0-dim) over `normalizer`, differentiable in `inputs`.

    `dinputs`, the derivatives of `loss`, may be overwritten by the backward. Where there is a sink,
    the backward adds the gradient to it instead of handing it on.
    """
    sinks = [None] * len(inputs) if sinks is None else sinks
    normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    return _KnownGradient.apply(loss, normalizer, sinks, *inputs, *dinputs)
