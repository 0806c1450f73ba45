"""Accuracy figures against worked examples."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from prefix_rft.config.sections import EvalConfig
from prefix_rft.evaluate.answers import Answers, answer
from prefix_rft.evaluate.statistics import bootstrap_interval, pass_at_k, summarize
from prefix_rft.reward import RewardError, Score
from tests.tiny import make_trainer


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(8, 3, 2), (5, 0, 3), (6, 6, 1)])
def test_pass_at_k_counts_the_subsets(num_samples: int, num_correct: int, k: int) -> None:
    outcomes = [True] * num_correct + [False] * (num_samples - num_correct)
    subsets = list(combinations(outcomes, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected)


def test_interval_holds_the_mean_and_shrinks_with_data() -> None:
    few, many = np.array([0.0, 1.0] * 10), np.array([0.0, 1.0] * 200)
    (low, high), (low_many, high_many) = bootstrap_interval(few), bootstrap_interval(many)
    assert low < 0.5 < high
    # normal approximation: 1.96 * 0.5 / sqrt(n)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, rel=0.1)
    assert high_many - low_many == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.1)


def test_figures_of_an_evaluation() -> None:
    trainer = make_trainer({"rollout": {"group_size": 2, "max_response_length": 12}})
    trainer.rewarder.rule = lambda text, problem: float(problem.index < 3)
    answers = answer(
        trainer.problems,
        trainer.engine,
        trainer.rewarder,
        trainer.tokenizer,
        config=EvalConfig(num_samples=4),
        max_response_length=12,
        seed=0,
    )
    results = summarize(answers)
    assert results["num_problems"] == 4
    assert results["greedy"] == results["avg@4"] == results["pass@4"] == 0.75
    assert results["statuses"] == {"correct": 12, "wrong": 4}
    assert 0 < results["response_length_mean"] <= 12
    assert 0 <= results["truncated_frac"] <= 1


def answers_with(
    rewards: Sequence[float | None], least: float = 1.0, group: str | None = None
) -> Answers:
    """Greedy is the first of them."""
    scores = [
        Score(
            reward=reward,
            status="no_reward" if reward is None else "correct" if reward >= least else "wrong",
        )
        for reward in rewards
    ]
    k = len(scores)
    return Answers(
        greedy=scores[0],
        scores=tuple(scores),
        lengths=(5,) * k,
        truncated=(False,) * k,
        group=group,
    )


@pytest.mark.parametrize(("least", "accuracy", "passed"), [(1.0, 0.0, 0.0), (0.5, 0.25, 1.0)])
def test_correct_means_one_thing(least: float, accuracy: float, passed: float) -> None:
    results = summarize([answers_with([0.9, 0.0, 0.0, 0.0], least)] * 3)
    assert results["greedy"] == results["pass@4"] == passed
    assert results["avg@4"] == accuracy
    assert results["statuses"].get("correct", 0) == 12 * accuracy
    assert results["reward_mean"] == pytest.approx(0.225)
    assert "reward_mean" not in summarize([answers_with([1.0, 0.0])])


def test_answers_without_a_reward_take_no_part() -> None:
    problems = [[1.0, None, 0.0, None], [None, None, None, 1.0], [None] * 4, [0.0] * 4]
    results = summarize(list(map(answers_with, problems)))
    assert results["num_problems"] == 4
    assert results["greedy"] == 1 / 2
    assert results["avg@4"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert results["pass@4"] == pytest.approx(2 / 3)
    assert results["statuses"] == {"correct": 2, "no_reward": 9, "wrong": 5}
    with pytest.raises(RewardError, match="no reward for any answer to 2 held-out problems"):
        summarize([answers_with([None, None])] * 2)


def test_each_group_has_figures_of_its_own() -> None:
    answers = [
        answers_with([1.0, 0.0], group="easy"),
        answers_with([0.0, 0.0], group="hard"),
        answers_with([0.0, 1.0], group="easy"),
        answers_with([1.0, 1.0], group="easy"),
        answers_with([None, None], group="broken"),
    ]
    results = summarize(answers)
    assert results["greedy"] == 2 / 4 and results["avg@2"] == 2 / 4
    by_group = {name: value for name, value in results.items() if "/" in name}
    intervals = {name: by_group.pop(name) for name in list(by_group) if name.endswith("_ci95")}
    assert list(by_group.items()) == [
        ("num_problems/easy", 3),
        ("greedy/easy", 2 / 3),
        ("avg@2/easy", 2 / 3),
        ("num_problems/hard", 1),
        ("greedy/hard", 0.0),
        ("avg@2/hard", 0.0),
        ("num_problems/broken", 1),
    ]
    assert intervals["avg@2/hard_ci95"] == [0.0, 0.0]
    assert intervals["avg@2/easy_ci95"] == bootstrap_interval(np.array([0.5, 0.5, 1.0]))
    assert intervals["greedy/easy_ci95"] == bootstrap_interval(np.array([1.0, 0.0, 1.0]))
    assert not any("/" in name for name in summarize([answers_with([1.0, 0.0])]))


def test_the_group_is_the_value_of_the_column() -> None:
    trainer = make_trainer({"rollout": {"group_size": 2, "max_response_length": 12}})
    problems = [
        replace(problem, columns={"level": level})
        for problem, level in zip(trainer.problems, (2, 1, 1, 2), strict=True)
    ]
    trainer.rewarder.rule = lambda text, problem: float(problem.columns["level"] == 1)
    answers = answer(
        problems,
        trainer.engine,
        trainer.rewarder,
        trainer.tokenizer,
        config=EvalConfig(num_samples=2, group_by="level"),
        max_response_length=12,
        seed=0,
    )
    assert [each.group for each in answers] == ["2", "1", "1", "2"]
    results = summarize(answers)
    assert (results["avg@2/1"], results["avg@2/2"]) == (1.0, 0.0)
    assert (results["num_problems/1"], results["num_problems/2"]) == (2, 2)
