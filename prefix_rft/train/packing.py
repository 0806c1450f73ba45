"""Rows -> one flat batch -> micro-batches by token budget. Pure.

A row is fed without its last token, which predicts nothing; position t predicts token t + 1.
"""

import heapq
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate

import torch

from prefix_rft.data_types import TrainBatch, TrainRow

IGNORE = -100  # target of a position that predicts no response token
_NOT_PER_TOKEN = ("cu_seqlens", "lengths", "active_rows")


def pack(rows: Sequence[TrainRow], *, device: torch.device, dtype: torch.dtype) -> TrainBatch:
    """Lay `rows` end to end in their order; floating fields get `dtype`."""
    inputs, positions, targets, lengths = [], [], [], []
    is_response, is_prefix, advantages, weights, rollout_log_probs = [], [], [], [], []
    for row in rows:
        num_context = len(row.prompt_ids) - 1  # positions that predict prompt tokens
        response = row.response_ids
        length = num_context + len(response)
        lengths.append(length)
        inputs += (row.prompt_ids + response)[:-1]
        positions += range(length)
        targets += [IGNORE] * num_context + list(response)
        is_response += [False] * num_context + [True] * len(response)
        for per_token in (is_prefix, advantages, weights, rollout_log_probs):
            per_token += [0] * num_context
        for segment in row.segments:
            n = len(segment.token_ids)
            is_prefix += [segment.source == "demonstration"] * n
            advantages += [segment.advantage] * n
            weights += [segment.weight] * n
            rollout_log_probs += segment.rollout_log_probs or [0.0] * n

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return TrainBatch(
        input_ids=integers(inputs),
        position_ids=integers(positions),
        targets=integers(targets),
        cu_seqlens=_cu_seqlens(lengths, device),
        lengths=tuple(lengths),
        response_mask=torch.tensor(is_response, dtype=torch.bool, device=device),
        prefix_mask=torch.tensor(is_prefix, dtype=torch.bool, device=device),
        advantages=floats(advantages),
        weights=floats(weights),
        rollout_log_probs=floats(rollout_log_probs),
    )


def plan_micro_batches(
    lengths: Sequence[int], max_tokens: int, num_ranks: int = 1
) -> list[list[list[int]]]:
    """Row indices of the micro-batches, [rank][round]: as many rounds on every rank.

    Each row is in one micro-batch; a row longer than `max_tokens` goes alone. The ranks' micro-
    batches of one round, which wait for each other, are of like size; the largest come first. Where
    the rows do not suffice for all ranks the last ones are empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    num_bins = -(-len(_first_fit(order, lengths, max_tokens)) // num_ranks) * num_ranks
    while (bins := _balance(order, lengths, max_tokens, num_bins)) is None:
        num_bins += num_ranks
    bins.sort(key=lambda rows: -sum(lengths[row] for row in rows))
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _first_fit(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Tokens of each bin when every row goes to the first that has room for it."""
    loads: list[int] = []
    for row in order:
        fitting = (i for i, load in enumerate(loads) if load + lengths[row] <= max_tokens)
        index = next(fitting, None)
        if index is None:
            loads.append(0)
            index = -1
        loads[index] += lengths[row]
    return loads


def _balance(
    order: Sequence[int], lengths: Sequence[int], max_tokens: int, num_bins: int
) -> list[list[int]] | None:
    """Each row, longest first, to the emptiest bin; None where it has no room for one."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for row in order:
        load, index = heap[0]
        if load and load + lengths[row] > max_tokens:
            return None
        heapq.heapreplace(heap, (load + lengths[row], index))
        bins[index].append(row)
    return bins


def token_index(batch: TrainBatch, rows: Sequence[int]) -> torch.Tensor:
    """Positions in `batch` of the tokens of `rows`, in their order: [T'] int64."""
    starts = [0, *accumulate(batch.lengths)]
    spans = [torch.arange(starts[row], starts[row + 1]) for row in rows]
    return torch.cat([torch.arange(0), *spans]).to(batch.input_ids.device)


def take_rows(batch: TrainBatch, rows: Sequence[int]) -> TrainBatch:
    """The batch of `rows` alone, in their order."""
    index = token_index(batch, rows)
    lengths = tuple(batch.lengths[row] for row in rows)
    tokens = {
        field.name: getattr(batch, field.name)[index]
        for field in fields(batch)
        if field.name not in _NOT_PER_TOKEN and getattr(batch, field.name) is not None
    }
    cu_seqlens = _cu_seqlens(lengths, index.device)
    return replace(batch, **tokens, lengths=lengths, cu_seqlens=cu_seqlens, active_rows=None)


def dummy_batch(batch: TrainBatch) -> TrainBatch:
    """The shortest row of `batch` without any token in the loss, for a rank that has no row left.

    Its forward and backward keep the rank in step with the others, and add nothing.
    """
    row = min(range(len(batch.lengths)), key=batch.lengths.__getitem__)
    alone = take_rows(batch, [row])
    return replace(alone, response_mask=torch.zeros_like(alone.response_mask))


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
