"""Rows whose responses the trainer finds far more, or far less, likely than the engine did.

Such a row was sampled from something other than the policy. A bound on the ratio of its two
probabilities leaves it out, as a whole: Masked Importance Sampling of TRL ("sequence_mask"),
rejection of verl ("sequence", "geometric").
"""

import math
from dataclasses import replace
from typing import Literal

import torch

from prefix_rft.data_types import TrainBatch


def mismatched_rows(
    batch: TrainBatch,
    log_probs: torch.Tensor,
    *,
    limit: float,
    level: Literal["sequence", "geometric"],
) -> torch.Tensor:
    """[B] bool, rows whose ratio of probabilities is outside [1 / limit, limit], or not a number.

    Args:
        log_probs: [T] by the trainer, of the policy that generated.
        level: the ratio is that of the whole response, as far as it was sampled, or its geometric
            mean over tokens.
    """
    sampled = batch.response_mask & ~batch.prefix_mask
    gap = torch.where(sampled, log_probs - batch.rollout_log_probs, 0)
    offsets = batch.cu_seqlens.long()
    log_ratio = torch.segment_reduce(gap, "sum", offsets=offsets, initial=0)
    if level == "geometric":
        counts = torch.segment_reduce(sampled.to(gap.dtype), "sum", offsets=offsets, initial=0)
        log_ratio = log_ratio / counts.clamp(min=1)
    return ~(log_ratio.abs() <= math.log(limit))


def without_rows(batch: TrainBatch, rows: torch.Tensor) -> TrainBatch:
    """The batch in which no token of `rows`, [B] bool, is in the loss or can be selected."""
    lengths = batch.cu_seqlens.diff()
    kept = ~rows.repeat_interleave(lengths, output_size=len(batch.input_ids))
    return replace(
        batch, response_mask=batch.response_mask & kept, prefix_mask=batch.prefix_mask & kept
    )
