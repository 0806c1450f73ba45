"""Runs whose reward function fails, or has no reward for some responses."""

from pathlib import Path

import pytest

from prefix_rft.metrics.logger import read_records
from prefix_rft.reward import RewardError, Score
from prefix_rft.train import list_checkpoints, train
from prefix_rft.train.interrupt import Interrupt
from tests.tiny import even_length, make_run, make_trainer

calls = 0


def fails_in_the_fourth_step(completions: list[str], **columns: object) -> list[float]:
    """The base's evaluation takes two calls, each step one."""
    global calls
    calls += 1
    if calls == 2 + 4:
        raise ConnectionError("the judge is away")
    return even_length(completions)


def test_whole_steps_are_saved_when_the_function_raises(tmp_path: Path) -> None:
    config = make_run(
        tmp_path,
        reward={"function": f"{__name__}:fails_in_the_fourth_step"},
        trainer={"checkpoint_every": 0},
    )
    with pytest.raises(RewardError, match="raised ConnectionError: the judge is away\n\nTraceback"):
        train(config)
    assert [path.name for path in list_checkpoints(config.run_dir)] == ["step-000003"]
    summary = train(config, resume=True)
    assert {"base", "trained"} <= set(summary)
    steps = [each["step"] for each in read_records(config.run_dir / "metrics.jsonl")]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4]


def test_rollouts_without_a_reward_take_part_in_nothing() -> None:
    """One group keeps all, one none: means, fractions and normalizer are those of the others."""
    values = {
        "rollout": {"group_size": 4, "max_response_length": 12},
        "trainer": {"prompts_per_step": 4, "prompts_per_update": 4, "num_steps": 1},
        "reward": {"allow_none": True},
        "method": {"name": "rft"},
    }
    trainer = make_trainer(values)
    score = trainer.rewarder.score
    unscored = {0, 5, 6, 8, 9, 10, 11}  # one group has none at all

    def some(completions: list[str], problems: list) -> list[Score]:
        scores = score(completions, problems)
        none = Score(reward=None, status="no_reward")
        return [none if i in unscored else each for i, each in enumerate(scores)]

    trainer.rewarder.score = some
    groups = {}
    plain = trainer.rollouts
    trainer.rollouts = lambda *args: groups.setdefault("seen", plain(*args))
    metrics, _ = trainer.train_step(Interrupt())
    sizes = [len(group.rollouts) for group in groups["seen"]]
    assert sorted(sizes) == [0, 2, 3, 4]
    rewards = [rollout.reward for group in groups["seen"] for rollout in group.rollouts]
    assert metrics["grader/no_reward_frac"] == 7 / 16
    assert metrics["reward/mean"] == pytest.approx(sum(rewards) / 9)
    for mini_batch in trainer.method.mini_batches(groups["seen"], 0):
        assert mini_batch.normalizer == 9 * 12
