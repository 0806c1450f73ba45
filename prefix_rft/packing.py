"""Rows -> one flat batch -> micro-batches by token budget. Pure.

A row is fed without its last token, which predicts nothing; position t predicts token t + 1.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate

import torch

from prefix_rft.data_types import TrainBatch, TrainRow

IGNORE = -100  # target of a position that predicts no response token


def pack(rows: Sequence[TrainRow], *, device: torch.device, dtype: torch.dtype) -> TrainBatch:
    """Lay `rows` end to end in their order; floating fields get `dtype`."""
    inputs, positions, targets = [], [], []
    is_response, is_prefix, advantages, rollout_log_probs, lengths = [], [], [], [], []
    for row in rows:
        rollout = row.rollout
        num_context = len(rollout.prompt_ids) - 1  # positions that predict prompt tokens
        num_prefix = rollout.prefix_length
        num_continuation = len(rollout.response_ids) - num_prefix
        length = num_context + len(rollout.response_ids)
        lengths.append(length)
        inputs += (rollout.prompt_ids + rollout.response_ids)[:-1]
        positions += range(length)
        targets += [IGNORE] * num_context + list(rollout.response_ids)
        is_response += [False] * num_context + [True] * len(rollout.response_ids)
        is_prefix += [False] * num_context + [True] * num_prefix + [False] * num_continuation
        advantages += (
            [0.0] * num_context
            + [row.prefix_advantage] * num_prefix
            + [row.advantage] * num_continuation
        )
        rollout_log_probs += [0.0] * (num_context + num_prefix) + list(rollout.rollout_log_probs)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return TrainBatch(
        input_ids=integers(inputs),
        position_ids=integers(positions),
        targets=integers(targets),
        cu_seqlens=_cu_seqlens(lengths, device),
        lengths=tuple(lengths),
        response_mask=torch.tensor(is_response, dtype=torch.bool, device=device),
        prefix_mask=torch.tensor(is_prefix, dtype=torch.bool, device=device),
        advantages=torch.tensor(advantages, dtype=dtype, device=device),
        rollout_log_probs=torch.tensor(rollout_log_probs, dtype=dtype, device=device),
    )


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices of each micro-batch: longest row first, first fit; a longer row goes alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = (i for i, free in enumerate(room) if lengths[row] <= free)
        index = next(fitting, None)
        if index is None:
            bins.append([])
            room.append(max_tokens)
            index = len(bins) - 1
        bins[index].append(row)
        room[index] -= lengths[row]
    return bins


def token_index(batch: TrainBatch, rows: Sequence[int]) -> torch.Tensor:
    """Positions in `batch` of the tokens of `rows`, in their order: [T'] int64."""
    starts = [0, *accumulate(batch.lengths)]
    spans = [torch.arange(starts[row], starts[row + 1]) for row in rows]
    return torch.cat(spans).to(batch.input_ids.device)


def take_rows(batch: TrainBatch, rows: Sequence[int]) -> TrainBatch:
    """The batch of `rows` alone, in their order."""
    index = token_index(batch, rows)
    lengths = tuple(batch.lengths[row] for row in rows)
    tokens = {
        field.name: getattr(batch, field.name)[index]
        for field in fields(batch)
        if field.name not in ("cu_seqlens", "lengths") and getattr(batch, field.name) is not None
    }
    cu_seqlens = _cu_seqlens(lengths, index.device)
    return replace(batch, **tokens, lengths=lengths, cu_seqlens=cu_seqlens)


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
