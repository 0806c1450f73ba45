"""A loss of the caller's: any function of a row's log-probability, entropy and lse, by autograd.

T tokens, n rows of a tile. The function sees [n] vectors, and so does autograd.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _check

LossFn = Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]
_OWN_METRICS = ("num_tokens", "entropy_sum")


class FunctionLoss:
    """The sum of `loss_fn` over rows, of (log_probs, entropy, *tokens), taken a tile at a time.

    with_lse: it is of (log_probs, entropy, lse, *tokens).
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tokens: tuple[Tensor, ...],  # [T] each
        *,
        with_lse: bool = False,
        check: bool,
    ) -> None:
        self._loss_fn, self._tokens = loss_fn, tokens
        self._num_stats = 3 if with_lse else 2
        self._generator = torch.Generator().manual_seed(0) if check else None
        self._sums: dict[str, Tensor] = {}

    def take(
        self,
        rows: slice | Tensor,
        inside: Tensor,  # [n] which of them are in the loss
        log_probs: Tensor,  # [n]
        entropy: Tensor,  # [n]
        lse: Tensor,  # [n]
    ) -> list[Tensor | None]:
        """Adds these rows; the derivatives [n] of their losses, or None if it is 0 for any."""
        stats = (log_probs, entropy, lse)[: self._num_stats]
        arguments = (*stats, *(x[rows] for x in self._tokens))
        losses, metrics, *slopes = self._evaluate(*arguments)
        if self._generator is not None:
            self._check_rows([x[inside] for x in arguments])
        sums = {"loss": losses, "num_tokens": torch.ones_like(log_probs), "entropy_sum": entropy}
        for name, value in (sums | metrics).items():
            total = torch.where(inside, value.detach().to(log_probs.dtype), 0).sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        return [None if x is None else torch.where(inside, x, 0) for x in slopes]

    def finish(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and those of the metrics: 0-dim, in the dtype of `like`."""
        if not self._sums:  # a function that saw no row still has to name its metrics
            self.take(slice(0), like[:0] != 0, *[like[:0]] * 3)
        return self._sums["loss"], {k: x for k, x in self._sums.items() if k != "loss"}

    def _evaluate(self, *arguments: Tensor) -> tuple:
        """Losses [n], metrics, and the derivatives of each row's loss by its statistics."""
        log_probs, tokens = arguments[0], arguments[self._num_stats :]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in arguments[: self._num_stats]]
            result = self._loss_fn(*inputs, *tokens)
            losses, metrics = result if isinstance(result, tuple) else (result, {})
            _check.tensor("loss_fn's result", losses, shape=log_probs.shape, like=log_probs)
            for name, value in metrics.items():
                shape = log_probs.shape
                _check.tensor(f"metric {name!r} of loss_fn", value, dtypes=(), shape=shape)
                if name in ("loss", *_OWN_METRICS):
                    raise ValueError(f"loss_fn must not return a metric named {name!r}")
            slopes = [None] * len(inputs)
            if losses.requires_grad:
                slopes = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        return losses.detach(), metrics, *slopes

    def _check_rows(self, arguments: list[Tensor]) -> None:
        """ValueError where some of the rows alone give other losses or derivatives.

        In float64, so that the order in which a device rounds is not mistaken for a difference.
        """
        arguments = [x.double() if x.is_floating_point() else x for x in arguments]
        num_rows, device = len(arguments[0]), arguments[0].device
        order = torch.randperm(num_rows, generator=self._generator).to(device)
        some = order[: (num_rows + 1) // 2]
        losses, _, *slopes = self._evaluate(*arguments)
        losses_alone, _, *slopes_alone = self._evaluate(*(x[some] for x in arguments))
        for among, alone in zip((losses, *slopes), (losses_alone, *slopes_alone), strict=True):
            if among is not None and not torch.allclose(
                among[some], alone, rtol=1e-9, atol=1e-12, equal_nan=True
            ):
                raise ValueError(
                    f"loss_fn must look at one row at a time: {len(some)} of {num_rows} rows "
                    "give other losses or derivatives alone than among the others"
                )


def check_function(
    loss_fn: LossFn,
    tokens: tuple[Tensor, ...],
    mask: Tensor | None,
    normalizer: float | Tensor,
    like: Tensor,  # [...], of the targets' shape and on their device
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Checks and flattens what a loss of the caller's takes per row."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    _check.normalizer(normalizer)
    if not isinstance(tokens, tuple | list):
        raise TypeError(f"tokens must be a tuple of tensors, got {type(tokens).__name__}")
    for i, x in enumerate(tokens):
        _check.tensor(f"tokens[{i}]", x, dtypes=(), shape=like.shape, like=like)
    if mask is not None:
        _check.mask("mask", mask, like)
    flat = tuple(x.detach().reshape(-1) for x in tokens)
    return flat, None if mask is None else mask.reshape(-1)
