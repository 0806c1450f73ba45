"""Truncated rollouts count for their group and are not learnt from."""

from collections.abc import Sequence

import pytest

from prefix_rft.data_types import FinishReason, Group, Rollout
from prefix_rft.metrics import measure_updates
from prefix_rft.metrics.step_metrics import StepMetrics
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, assert_equals_twin, method_trainer

MASKED = {"mask_truncated": True}


def made_group(
    trainer, rewards: Sequence[float], reasons: Sequence[FinishReason], *, hybrids: int = 0
) -> Group:
    """A group of `trainer`'s first problem; the last `hybrids` begin with its demonstration."""
    problem, rollouts = trainer.problems[0], []
    for k, (reward, reason) in enumerate(zip(rewards, reasons, strict=True)):
        length = 2 if k >= len(rewards) - hybrids else 0
        rollouts.append(
            Rollout(
                prompt_ids=problem.prompt_ids,
                response_ids=problem.demonstration_ids[:length] + (5, 6, 7 + k),
                prefix_length=length,
                rollout_log_probs=(-1.0,) * 3,
                finish_reason=reason,
                text="",
                reward=reward,
                status="correct" if reward else "wrong",
            )
        )
    return Group(problem=problem, rollouts=tuple(rollouts))


@pytest.mark.parametrize("name", ["rft", "prefix_rft", "rl_sft_loss"])
def test_a_truncated_rollout_is_in_the_mean_and_has_no_row(name: str) -> None:
    """Rewards 1 0 0 1, of which the second and the last, a hybrid, are cut: A = 0.5 and -0.5."""
    masked, plain = method_trainer(name, rollout=MASKED), method_trainer(name)
    group = made_group(
        masked, [1.0, 0.0, 0.0, 1.0], ["stop", "length", "stop", "length"], hybrids=1
    )
    found = {}
    for trainer, expected in (
        (masked, {0: 0.5, 2: -0.5}),
        (plain, {0: 0.5, 1: -0.5, 2: -0.5, 3: 0.5}),
    ):
        [mini_batch] = trainer.method.mini_batches([group], 0)
        rows = [row for row in mini_batch.rows if isinstance(row.origin, Rollout)]
        places = [group.rollouts.index(row.origin) for row in rows]
        advantages = [row.segments[-1].advantage for row in rows]
        assert dict(zip(places, advantages, strict=True)) == expected
        found[trainer is masked] = mini_batch
    assert found[True].normalizer == found[False].normalizer == GROUP_SIZE * MAX_LENGTH
    assert len(found[False].rows) - len(found[True].rows) == 2  # a demonstration stays


def test_a_group_that_was_cut_altogether_is_no_update() -> None:
    trainer = method_trainer("prefix_rft", rollout=MASKED)
    assert trainer.method.mini_batches([made_group(trainer, [1.0, 0.0], ["length"] * 2)], 0) == []


def test_with_an_entropy_bonus_every_row_but_the_truncated_ones_is_there() -> None:
    trainer = method_trainer("rft", rollout=MASKED, loss={"entropy_coef": 0.1})
    group = made_group(trainer, [1.0, 1.0, 1.0], ["stop", "length", "stop"])
    [mini_batch] = trainer.method.mini_batches([group], 0)
    assert [row.origin for row in mini_batch.rows] == [group.rollouts[0], group.rollouts[2]]


def test_rows_that_are_masked_count_as_left_out() -> None:
    """2 of 4, beside a group without an advantage: 6 of 8."""
    trainer = method_trainer("rft", rollout=MASKED)
    groups = [
        made_group(trainer, [1.0, 0.0, 0.0, 1.0], ["stop", "length", "stop", "length"]),
        made_group(trainer, [1.0] * 4, ["stop"] * 4),
    ]

    class Done:
        rows = trainer.method.mini_batches(groups, 0)[0].rows

    step_metrics = StepMetrics()
    with pytest.raises(AttributeError):  # an update has more than rows; those come first
        measure_updates(step_metrics, groups, [Done])
    assert step_metrics.result()["rollout/left_out_frac"] == 6 / 8


def rft_twin(now: View, before: View, groups: Sequence[Group]):
    """Dr. GRPO over the rollouts that ended by themselves, divided by N T of all."""
    total = 0.0
    for group in groups:
        mean = sum(rollout.reward for rollout in group.rollouts) / len(group.rollouts)
        for rollout in group.rollouts:
            if rollout.finish_reason == "stop":
                (log_probs, _), (old, _) = now.rollout(rollout), before.rollout(rollout)
                ratio, advantage = (log_probs - old.detach()).exp(), rollout.reward - mean
                clipped = ratio.clamp(0.8, 1.2)
                total = total - (advantage * ratio).minimum(advantage * clipped).sum()
    return total / (len(groups) * GROUP_SIZE * MAX_LENGTH)


def test_a_step_without_truncated_rollouts_equals_the_twin() -> None:
    step = assert_equals_twin(
        "rft", rft_twin, rule=lambda text, problem: sum(map(ord, text)) % 7 / 6, rollout=MASKED
    )
    rollouts = [rollout for group in step.groups for rollout in group.rollouts]
    num_learnt = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    assert 2 < num_learnt < len(rollouts)
    assert step.metrics["rollout/left_out_frac"] == 1 - num_learnt / len(rollouts)


def test_sft_has_nothing_to_mask() -> None:
    losses = []
    for options in ({}, MASKED):
        trainer = method_trainer("sft", rollout=options)
        [mini_batch] = trainer.method.mini_batches(
            [Group(problem=problem, rollouts=()) for problem in trainer.problems], 0
        )
        losses.append(mini_batch)
    assert losses[0] == losses[1] and len(losses[0].rows) == 4
