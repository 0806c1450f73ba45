"""Rows -> flat batch -> micro-batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_rft.data_types import Rollout, TrainRow
from prefix_rft.train.packing import dummy_batch, pack, plan_micro_batches, take_rows, token_index


def make_row(prompt, response, prefix_length, advantage=1.0, prefix_advantage=2.0) -> TrainRow:
    continuation = len(response) - prefix_length
    rollout = Rollout(
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        prefix_length=prefix_length,
        rollout_log_probs=tuple(-0.5 - i for i in range(continuation)),
        finish_reason="stop",
        text="",
        reward=1.0,
        status="correct",
    )
    return TrainRow.of_rollout(rollout, advantage=advantage, prefix_advantage=prefix_advantage)


def pack_cpu(rows):
    return pack(rows, device=torch.device("cpu"), dtype=torch.float32)


def test_a_row_stands_at_its_predicting_positions() -> None:
    batch = pack_cpu([make_row([1, 2, 3], [10, 11, 12, 13], prefix_length=2)])
    assert batch.input_ids.tolist() == [1, 2, 3, 10, 11, 12]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [-100, -100, 10, 11, 12, 13]
    assert batch.response_mask.tolist() == [False, False, True, True, True, True]
    assert batch.prefix_mask.tolist() == [False, False, True, True, False, False]
    assert batch.advantages.tolist() == [0, 0, 2, 2, 1, 1]
    assert batch.rollout_log_probs.tolist() == [0, 0, 0, 0, -0.5, -1.5]
    assert batch.cu_seqlens.tolist() == [0, 6]
    assert batch.lengths == (6,)


def test_taking_rows_equals_packing_them() -> None:
    rows = [make_row(range(n), range(n + 3), n % 3, advantage=n) for n in (2, 5, 3, 4)]
    batch = pack_cpu(rows)
    taken, packed = take_rows(batch, [3, 1]), pack_cpu([rows[3], rows[1]])
    assert taken.lengths == packed.lengths
    for name in ("input_ids", "position_ids", "targets", "cu_seqlens", "prefix_mask", "advantages"):
        assert torch.equal(getattr(taken, name), getattr(packed, name)), name


def test_token_index_puts_values_back() -> None:
    batch = pack_cpu([make_row(range(n), range(4), 1) for n in (1, 4, 2)])
    values = torch.zeros(len(batch.input_ids))
    for rows in ([2], [0, 1]):
        index = token_index(batch, rows)
        values[index] = take_rows(batch, rows).position_ids.float()
    assert torch.equal(values, batch.position_ids.float())


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100), st.integers(1, 5))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, max_tokens, ranks) -> None:
    plan = plan_micro_batches(lengths, max_tokens, ranks)
    assert len({len(rounds) for rounds in plan}) == 1 and len(plan) == ranks
    bins = [rows for rounds in plan for rows in rounds]
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    for rows in bins:
        assert len(rows) <= 1 or sum(lengths[row] for row in rows) <= max_tokens


@pytest.mark.parametrize(
    ("lengths", "ranks", "plan"),
    [
        ([3, 9, 4, 2], 1, [[[1], [2, 0, 3]]]),
        ([3, 9, 4, 2], 2, [[[1]], [[2, 0, 3]]]),
        ([30], 2, [[[0]], [[]]]),
        ([5, 5, 5], 2, [[[0, 2]], [[1]]]),
        ([], 2, [[], []]),
    ],
)
def test_the_longest_row_goes_first_and_ranks_share_evenly(lengths, ranks, plan) -> None:
    assert plan_micro_batches(lengths, 10, ranks) == plan


@given(st.lists(st.integers(1, 60), min_size=8, max_size=40))
def test_ranks_of_a_round_carry_like_loads(lengths) -> None:
    for rows in zip(*plan_micro_batches(lengths, 60, 4), strict=True):
        loads = sorted(sum(lengths[row] for row in part) for part in rows)
        assert loads[-1] - loads[0] <= max(lengths)


def test_a_dummy_batch_adds_nothing() -> None:
    batch = pack_cpu([make_row(range(n), range(4), 1) for n in (4, 1, 2)])
    filled = dummy_batch(batch)
    assert filled.lengths == (4,) and not filled.response_mask.any()
