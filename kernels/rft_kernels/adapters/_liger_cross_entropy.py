"""Liger's cross entropies with z-loss, with the signatures of Liger 0.8.5.

T rows, V classes, D hidden size. A row has the loss w_y (lse - z_y) + s lse^2, w the weights of the
classes and s the scale of the z-loss, which reach the logits as scalars of the row (E2). Smoothing
of labels does not: each class of a row would get a constant of its own beside its probability.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._check import NO_TARGET
from ..results import stats_dtype
from ..rows import token_stats_with_lse
from ._linear import argmax_of, head_loss, head_stats, head_stats_with_lse

Losses = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class _CrossEntropy:
    """The loss of a row and its reduction; a function for `linear_token_loss`."""

    def __init__(
        self,
        target: Tensor,  # [T]
        num_classes: int,
        class_weights: Tensor | None,  # [V]
        ignore_index: int,
        lse_square_scale: float,
        label_smoothing: float,
        reduction: str,
        scale_by_probability: bool = False,
    ) -> None:
        if label_smoothing != 0:
            raise NotImplementedError(
                "label_smoothing must be 0: its gradient by a class is more than a number of the "
                "row times that class's probability"
            )
        _check.one_of("reduction", reduction, ("mean", "sum", "none"))
        _check.number("lse_square_scale", lse_square_scale)
        _check.tensor("target", target, dtypes=_check.INTEGERS)
        self.targets = _without(target, ignore_index, num_classes)
        self.counted = self.targets != NO_TARGET
        self.reduced = reduction != "none"
        self._z_scale, self._by_probability = lse_square_scale, scale_by_probability
        self.num_rows = self.counted.sum().clamp(min=1).float()  # none: the loss is 0, as Liger's
        self.weights: Tensor | None = None  # [T], of the rows
        if class_weights is not None:
            shape = (num_classes,)
            _check.tensor("weight of the classes", class_weights, shape=shape, like=target)
            classes = torch.where(self.counted, self.targets, 0).clamp(max=num_classes - 1)
            weights = class_weights.detach().to(stats_dtype(class_weights.dtype))[classes]
            self.weights = torch.where(self.counted, weights, 0)
        self._total_weight = self._z_divisor = None
        if reduction == "mean":
            self._z_divisor = self.num_rows
            self._total_weight = self.num_rows if self.weights is None else self.weights.sum()

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        return () if self.weights is None else (self.weights,)

    def __call__(
        self, log_probs: Tensor, entropy: Tensor, lse: Tensor, *weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [n], over what their mean divides by, and of these the part of the z-loss."""
        nll = 0 - log_probs
        for weight in weights:
            nll = nll * weight.to(nll.dtype)
        z_loss = self._z_scale * lse.square()
        if self._total_weight is not None:
            nll, z_loss = nll / self._total_weight, z_loss / self._z_divisor
        if self._by_probability:
            p = log_probs.detach().exp()
            nll, z_loss = p * nll, p * z_loss
        loss = nll + z_loss if self._z_scale else nll
        return loss, {"z_loss": z_loss.detach()}

    def of_rows(self, stats: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss and z-loss of statistics [T]: [T] each, 0 in rows that do not count, or 0-dim."""
        loss, metrics = self(*stats, *self.tokens)
        found = (torch.where(self.counted, x, 0) for x in (loss, metrics["z_loss"]))
        return tuple(x.sum() if self.reduced else x for x in found)

    def with_predictions(
        self, loss: Tensor, z_loss: Tensor | None, predicted: Tensor | None, want: tuple[bool, bool]
    ) -> Losses:
        """The results, of which accuracy and predictions [T] are `want`ed or None."""
        accuracy = None
        if predicted is not None:
            correct = ((predicted == self.targets) & self.counted).float()
            accuracy = correct.sum() / self.num_rows if self.reduced else correct
            predicted = torch.where(self.counted, predicted, -1)
        return loss, z_loss, accuracy if want[0] else None, predicted if want[1] else None


def _without(target: Tensor, ignore_index: int, num_classes: int) -> Tensor:
    """Targets with our own index of rows that do not count."""
    if ignore_index == NO_TARGET:
        return target
    target = torch.where(target == NO_TARGET, num_classes, target)  # no class, and refused
    return torch.where(target == ignore_index, NO_TARGET, target)


class LigerCrossEntropyFunction:
    """Cross entropy with z-loss from logits, and what Liger's losses and functions call for it."""

    @staticmethod
    def apply(
        _input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int = NO_TARGET,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> Losses:
        """The results that are asked for, in Liger's order.

            loss = sum of weight_y (lse - z_y) / sum of weight_y + s sum of lse^2 / number of rows

        Args:
            _input: [T, V]; unless it is a leaf, the backward writes the gradient over it. (Liger's
                forward does, over a leaf too.)
            target: [T] int.
            weight: [V], of the classes; the z-loss is without.
            ignore_index: the target of rows that do not count.
            lse_square_scale: the s above.
            label_smoothing: 0.
            reduction: "mean" as above, "sum" undivided, "none" row by row.
            softcap: above 0, or None.
        Returns:
            (loss, z_loss, token_accuracy, predicted_tokens), float32 (float64 for float64) but for
            the last, int64 [T] and -1 where not counted; None where not asked for. Predictions cost
            one more reading.
        Raises:
            TypeError, ValueError: as `token_stats`, or another `reduction`.
            NotImplementedError: `label_smoothing`.
        The loss alone is differentiable, once, in `_input`.
        """
        rows = _CrossEntropy(
            target,
            _input.shape[-1],
            weight,
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
        )
        want = (return_token_accuracy, return_predicted_tokens)
        predicted = _input.detach().argmax(-1) if any(want) else None
        stats = token_stats_with_lse(
            _input, rows.targets, softcap=softcap, inplace_backward=not _input.is_leaf
        )
        loss, z_loss = rows.of_rows(stats)
        return rows.with_predictions(loss, z_loss if return_z_loss else None, predicted, want)


class LigerFusedLinearCrossEntropyFunction:
    """`LigerCrossEntropyFunction` from hidden states."""

    supports_inner_impl_dispatch = True  # Liger's functional form then passes all arguments

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = NO_TARGET,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl: Any = None,
        ce_mode: Any = None,
        chunk_mem_const: int = 1,
    ) -> Losses:
        """The results that are asked for, in Liger's order; the logits never exist whole.

        Args:
            _input, weight, bias: [T, D], [V, D], [V].
            ce_weight: [V], of the classes.
            use_token_scaling: each row times the probability of its target, as a constant.
            accum_dtype, ce_impl, ce_mode, chunk_mem_const: not needed here; sums are float32.
            others: see `LigerCrossEntropyFunction`.
        Returns:
            As `LigerCrossEntropyFunction`. Predictions cost one more projection.
        Raises:
            TypeError, ValueError: as `linear_token_stats`, or another `reduction`.
            NotImplementedError: `label_smoothing`.
        The loss alone is differentiable, once, in `_input`, `weight` and `bias`: in one pass, or if
        `reduction` is "none" by another projection in the backward.
        """
        rows = _CrossEntropy(
            target,
            len(weight),
            ce_weight,
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
            use_token_scaling,
        )
        head = {"bias": bias, "softcap": softcap}
        if rows.reduced:
            found = head_loss(_input, weight, rows.targets, rows, tokens=rows.tokens, **head)
            loss, z_loss = found.loss, found.metrics["z_loss"]
        else:
            loss, z_loss = rows.of_rows(head_stats_with_lse(_input, weight, rows.targets, **head))
        want = (return_token_accuracy, return_predicted_tokens)
        predicted = argmax_of(_input, weight, bias) if any(want) else None
        return rows.with_predictions(loss, z_loss if return_z_loss else None, predicted, want)


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probability of each target, and entropy, from hidden states."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = NO_TARGET,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits never exist whole.

        Args:
            _input: [M, D].
            weight: [V, D].
            target: [M] int.
            temperature: above 0.
            ignore_index: the target of rows whose results are 0.
            m_tiles_per_cluster: not needed here.
        Returns:
            nll [M], or (nll, entropy [M]), float32 (float64 for float64), nats.
        Raises:
            TypeError, ValueError: as `linear_token_stats`.
            NotImplementedError: `selected_token_ids`, as each takes a number a row.
        Differentiable once in `_input` and `weight`.
        """
        if selected_token_ids is not None:
            raise NotImplementedError("selected_token_ids must be None: one class a row is served")
        target = _without(target, ignore_index, len(weight))
        log_probs, entropy = head_stats(_input, weight, target, temperature=temperature)
        return (0 - log_probs, entropy) if return_entropy else 0 - log_probs
