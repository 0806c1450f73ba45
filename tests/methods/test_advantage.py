"""Advantages of a group against the formulas of the paper, worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_rft.methods.advantage import Advantage, group_advantages


def test_joint_subtracts_the_mean_of_all_and_divides_by_nothing() -> None:
    advantages = group_advantages([1, 0, 0, 1], [False, False, False, True])
    assert advantages == [Advantage(a, a) for a in (0.5, -0.5, -0.5, 0.5)]


def test_exclude_hybrid_uses_the_mean_of_the_on_policy_rollouts() -> None:
    advantages = group_advantages(
        [1, 0, 0, 0, 1], [False, False, False, False, True], baseline="exclude_hybrid"
    )
    assert advantages[:4] == [Advantage(a, a) for a in (0.75, -0.25, -0.25, -0.25)]
    assert advantages[4] == Advantage(continuation=1.0, prefix=0.75)


def test_negative_prefix_advantage_is_kept_unless_told_otherwise() -> None:
    rewards, is_hybrid = [1, 1, 0], [False, False, True]
    assert group_advantages(rewards, is_hybrid)[2].prefix == pytest.approx(-2 / 3)
    dropped = group_advantages(rewards, is_hybrid, drop_negative_prefix=True)
    assert dropped[2] == Advantage(pytest.approx(-2 / 3), 0.0)


@pytest.mark.parametrize("baseline", ["joint", "exclude_hybrid"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_zero(baseline: str, reward: float) -> None:
    advantages = group_advantages([reward] * 7, [False] * 6 + [True], baseline=baseline)
    assert advantages == [Advantage(0.0, 0.0)] * 7


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16))
def test_joint_advantages_sum_to_zero(rewards: list[float]) -> None:
    total = sum(a.continuation for a in group_advantages(rewards, [False] * len(rewards)))
    assert total == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "is_hybrid", "baseline", "expected"),
    [
        ([], [], "joint", []),
        ([1.0], [False], "joint", [0.0]),
        ([1.0], [True], "exclude_hybrid", [0.0]),
        ([1.0, 0.0], [True, True], "exclude_hybrid", [0.0, 0.0]),
        ([1.0, 0.0], [True, True], "joint", [0.5, -0.5]),
    ],
)
def test_what_is_left_of_a_group_without_some_rewards(
    rewards: list[float], is_hybrid: list[bool], baseline: str, expected: list[float]
) -> None:
    advantages = group_advantages(rewards, is_hybrid, baseline=baseline)
    assert advantages == [Advantage(a, a) for a in expected]
