"""Advantages of a group against the formulas of the papers, worked by hand, and in a whole step."""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import Group, Problem, Rollout
from prefix_rft.methods.advantage import STD_EPS, Advantage, group_advantages, reward_scale
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.train.interrupt import Interrupt
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, method_trainer, take_step


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


def test_the_scale_is_the_standard_deviation_of_a_sample() -> None:
    """Of 1 0 0 1: mean 0.5, four squares of 0.25, divided by 3."""
    assert reward_scale([1, 0, 0, 1]) == pytest.approx(math.sqrt(1 / 3) + 1e-6, rel=1e-12)
    assert reward_scale([2, 0]) == pytest.approx(math.sqrt(2) + 1e-6, rel=1e-12)
    assert reward_scale([]) == reward_scale([3.0]) == reward_scale([0.5] * 4) == STD_EPS


def group_of(problem: Problem, rewards: Sequence[float], *, hybrids: int = 0) -> Group:
    """The last `hybrids` rollouts begin with the demonstration."""
    rollouts = []
    for k, reward in enumerate(rewards):
        prefix_ids = problem.demonstration_ids[: 2 if k >= len(rewards) - hybrids else 0]
        rollouts.append(
            Rollout(
                prompt_ids=problem.prompt_ids,
                response_ids=(*prefix_ids, 5, 6),
                prefix_length=len(prefix_ids),
                rollout_log_probs=(-1.0, -1.0),
                finish_reason="stop",
                text="",
                reward=reward,
                status="correct" if reward else "wrong",
            )
        )
    return Group(problem=problem, rollouts=tuple(rollouts))


def row_advantages(
    name: str, scale: str, rewards: Sequence[Sequence[float]], *, hybrids: int = 0, **options: str
) -> list[tuple[float, float]]:
    """(prefix, continuation) of each row of a step over groups with these rewards."""
    trainer = method_trainer(name, options, method={"name": name, "advantage_scale": scale})
    groups = [
        group_of(problem, each, hybrids=min(hybrids, len(each)))
        for problem, each in zip(trainer.problems, rewards, strict=False)
    ]
    mini_batches = trainer.method.mini_batches(groups, 0)
    assert all(each.normalizer == sum(map(len, rewards)) * MAX_LENGTH for each in mini_batches)
    rows = [row for mini_batch in mini_batches for row in mini_batch.rows]
    return [(row.segments[0].advantage, row.segments[1].advantage) for row in rows]


STD = math.sqrt(1 / 3) + 1e-6  # of 1 0 0 1


@pytest.mark.parametrize(
    ("scale", "divisor"), [("none", 1.0), ("std", STD), ("batch_std", math.sqrt(3 / 14) + 1e-6)]
)
def test_a_group_of_rft_divided_by_its_own_deviation_or_the_steps(scale, divisor) -> None:
    """1 0 0 1 beside 0 0 0 0: in the step 2 of 8 are 1, so (2 x 0.5625 + 6 x 0.0625) / 7."""
    found = row_advantages("rft", scale, [[1, 0, 0, 1], [0, 0, 0, 0]])
    expected = [x / divisor for x in (0.5, -0.5, -0.5, 0.5)]
    assert [continuation for _, continuation in found] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("baseline", ["joint", "exclude_hybrid"])
def test_a_hybrid_is_divided_by_the_deviation_of_the_whole_group(baseline: str) -> None:
    """1 0 0 and a hybrid of 1: a mean of 1/2 or, without the hybrid, 1/3; the deviation of all."""
    found = row_advantages("prefix_rft", "std", [[1, 0, 0, 1]], hybrids=1, advantage=baseline)
    mean = 1 / 2 if baseline == "joint" else 1 / 3
    hybrid = (1 - mean, 1 - mean if baseline == "joint" else 1.0)
    expected = [1 - mean, -mean, -mean, hybrid[1]]
    assert [x for _, x in found] == pytest.approx([x / STD for x in expected], rel=1e-12)
    assert found[3][0] == pytest.approx(hybrid[0] / STD, rel=1e-12)


@pytest.mark.parametrize("scale", ["none", "std", "batch_std"])
@pytest.mark.parametrize("name", ["rft", "prefix_rft"])
@pytest.mark.parametrize("rewards", [[[], [1.0], [1.0, 1.0]], [[]], [[0.3] * 4, [0.7]]])
def test_groups_that_are_empty_alone_or_alike_have_no_row(name, scale, rewards) -> None:
    assert row_advantages(name, scale, rewards) == []


@pytest.mark.parametrize("name", ["rft", "prefix_rft"])
def test_what_is_left_of_a_group_without_some_rewards_is_scaled_by_it(name: str) -> None:
    """Two rollouts of 1 and 0 kept a reward, another group one, a third none."""
    own, step = math.sqrt(1 / 2) + 1e-6, math.sqrt(1 / 3) + 1e-6  # of 1 0, and of 1 0 1
    for scale, divisor in (("std", own), ("batch_std", step)):
        found = row_advantages(name, scale, [[1.0, 0.0], [1.0], []])
        assert [x for _, x in found] == pytest.approx([0.5 / divisor, -0.5 / divisor], rel=1e-12)


def scaled_twin(
    now: View,
    before: View,
    groups: Sequence[Group],
    *,
    baseline: str,
    scale: str,
    step: list[Group],
) -> torch.Tensor:
    """The clipped objective over all tokens, prefixes included, with scaled advantages."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        everything = group.rollouts if scale == "std" else [r for g in step for r in g.rollouts]
        rewards = torch.tensor([rollout.reward for rollout in everything], dtype=torch.float64)
        divisor = rewards.std() + 1e-6
        own = [r.reward for r in group.rollouts if baseline == "joint" or not r.prefix_length]
        mean = sum(own) / len(own)
        is_equal = len({rollout.reward for rollout in group.rollouts}) == 1
        for rollout in [] if is_equal else group.rollouts:
            (log_probs, _), (old, _) = now.rollout(rollout), before.rollout(rollout)
            ratio = (log_probs - old.detach()).exp()
            advantages = torch.full_like(ratio, rollout.reward - mean)
            if baseline != "joint" and rollout.prefix_length:
                advantages[rollout.prefix_length :] = rollout.reward
            advantages = advantages / divisor
            clipped = ratio.clamp(0.8, 1.2)
            total = total - (advantages * ratio).minimum(advantages * clipped).sum()
    return total / (len(groups) * GROUP_SIZE * MAX_LENGTH)


@pytest.mark.parametrize("scale", ["std", "batch_std"])
@pytest.mark.parametrize(
    ("name", "baseline"),
    [("rft", "joint"), ("prefix_rft", "joint"), ("prefix_rft", "exclude_hybrid")],
)
def test_a_step_of_two_updates_equals_the_twin(name: str, baseline: str, scale: str) -> None:
    """The deviation of the step is that of both updates; every prefix token is trained on."""
    options = {"advantage": baseline, "selection_fraction": 1.0} if name == "prefix_rft" else None
    trainer = method_trainer(
        name,
        options,
        method={"name": name, "advantage_scale": scale},
        trainer={"prompts_per_update": 2, "micro_batch_tokens": 60},
    )
    trainer.rewarder.rule = lambda text, problem: (
        0.5 if problem.index == 0 else sum(map(ord, text)) % 7 / (1 + problem.index)
    )
    whole = trainer.rollouts(StepMetrics(), Interrupt())
    loss = partial(scaled_twin, baseline=baseline, scale=scale, step=whole)
    step = take_step(trainer, [(loss, slice(0, 2), "policy"), (loss, slice(2, 4), "policy")])
    assert step.groups == whole
    for ours, expected in step.losses:
        assert abs(ours - expected) <= 1e-9 * abs(expected) + 1e-12
    assert max(step.gradient_errors) < 1e-9
    assert step.weight_error < 1e-9 and step.moved > 1e-3


def test_a_scale_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="method.advantage_scale: expected 'none' or 'std' or 'b"):
        config_from_dict({"method": {"advantage_scale": "group"}})
