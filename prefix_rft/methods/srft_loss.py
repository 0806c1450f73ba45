"""The loss of a token in SRFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from prefix_rft.data_types import TrainBatch

GAMMA = 0.1  # f(p) = p / (p + gamma), as in LUFFY


def srft_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    advantages: torch.Tensor,
    row_entropy: torch.Tensor,
    is_demonstration: torch.Tensor,
    *,
    sft: float,
    sign: float,
    shaped: bool,
    correct_coef: float,
    by_row: bool,
    entropy_coef: float,
) -> torch.Tensor:
    """What follows, minus an entropy bonus; all e^H are weights, without a slope of their own.

    Demonstration: -sft e^(sign H) log p - A p, or -A f(p) in the place of -A p. Correct rollout:
    -correct_coef e^H log p. Wrong rollout: log p.

    Args:
        advantages: of demonstrations; above 0 on correct rollouts, below on wrong ones.
        row_entropy: H, where it is that of the row.
    """
    h = row_entropy if by_row else entropy.detach()
    p = log_probs.exp()
    policy = -advantages * (p / (p + GAMMA) if shaped else p)
    demonstrations = policy - sft * (sign * h).exp() * log_probs
    rollouts = (-correct_coef * h.exp() * log_probs).where(advantages > 0, log_probs)
    return demonstrations.where(is_demonstration, rollouts) - entropy_coef * entropy


def row_means(batch: TrainBatch, values: torch.Tensor) -> torch.Tensor:
    """[T], the mean of `values` over the response tokens of the same row."""
    lengths = batch.cu_seqlens.diff()
    row = lengths.new_ones(len(lengths)).cumsum(0).sub(1)
    row = row.repeat_interleave(lengths, output_size=len(values))
    sums, counts = values.new_zeros(2, len(lengths)).unbind()
    is_response = batch.response_mask.to(values.dtype)
    sums = sums.index_add(0, row, values * is_response)
    counts = counts.index_add(0, row, is_response)
    return (sums / counts.clamp(min=1))[row]
