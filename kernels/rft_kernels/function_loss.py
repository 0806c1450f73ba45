"""Logits to a loss of the caller's: statistics, the function, its gradient by autograd (E2).

T rows, V classes. Reads T V elements forward; backward reads and writes the rows that have a
gradient.
"""

from torch import Tensor

from . import _check
from .objective import FunctionLoss, LossFn, attach_gradient, check_function
from .results import PolicyLoss
from .rows import token_stats_with_lse


def token_loss(
    logits: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    tokens: tuple[Tensor, ...] = (),
    mask: Tensor | None = None,
    normalizer: float | Tensor,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
    with_lse: bool = False,
    check: bool = False,
) -> PolicyLoss:
    """Any loss of a token that is a function of its log-probability and entropy, and perhaps lse.

        log_probs, entropy = token_stats(logits, targets)
        loss = sum of loss_fn(log_probs, entropy, *tokens) over mask and has-target / normalizer

    Args:
        logits, targets, softcap, temperature, vocab_size, inplace_backward, backend: see
            `token_stats`.
        loss_fn: from log_probs [n], entropy [n] and the `tokens` of n rows, in plain differentiable
            torch, to their losses [n]; or to the pair of these and `{name: [n]}`, summed into the
            metrics. It must look at one row at a time.
        tokens: tensors [...] of any dtype, without a gradient.
        mask: [...] bool, the rows in the loss; whatever stands elsewhere has no part in it. None:
            all with a target.
        normalizer: above 0; a number or 0-dim tensor.
        with_lse: the function is one of (log_probs, entropy, lse, *tokens), lse that of
            `token_stats_with_lse`; for a z-loss.
        check: refuse a `loss_fn` by which a random half of the rows has other losses or derivatives
            alone than among the others (a mean, a softmax over rows); waits for the device.
    Returns:
        PolicyLoss; selected_mask is None, and metrics are sums over the rows in the loss:
        num_tokens, entropy_sum and those of `loss_fn`.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; `loss_fn`
            gives something else than [n], or with `check` looks across rows.
    The loss is differentiable once in `logits`. Deterministic if `loss_fn` is. Reads every row
    once; the backward reads and writes the rows with a gradient. Not under
    torch.compile(fullgraph=True), since an op cannot carry a function.
    """
    found = token_stats_with_lse(
        logits,
        targets,
        softcap=softcap,
        temperature=temperature,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    tokens, in_loss = check_function(loss_fn, tokens, mask, normalizer, found.entropy)
    valid = (targets != _check.NO_TARGET).reshape(-1)
    in_loss = valid if in_loss is None else in_loss & valid
    loss = FunctionLoss(loss_fn, tokens, with_lse=with_lse, check=check)
    inputs = [x.view(-1) for x in found]
    held = [x.detach() for x in inputs]
    slopes = loss.take(slice(None), in_loss, *held)
    total, metrics = loss.finish(held[0])
    chosen = [i for i, slope in enumerate(slopes) if slope is not None]
    gradient = ([part[i] for i in chosen] for part in (inputs, slopes))
    total = attach_gradient(total, normalizer, *gradient)
    return PolicyLoss(total, *(x.detach() for x in found[:2]), None, metrics)
