"""Several rewards of one response: their weighted sum, its status, and what is refused."""

import math
import threading
from collections.abc import Callable, Sequence

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict, load_config, save_config
from prefix_rft.config.sections import RewardConfig
from prefix_rft.data_types import Problem
from prefix_rft.metrics import measure_generated
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.reward import RewardError
from prefix_rft.reward.reward import Rewarder, Score
from prefix_rft.reward.scoring import Scoring
from prefix_rft.train.interrupt import Interrupt
from tests.tiny import make_trainer

PROBLEMS = [
    Problem(index=i, prompt="?", prompt_ids=(1,), answer=answer) for i, answer in enumerate("123")
]
TEXTS = [r"\boxed{1}", r"so \boxed{7}", "none"]


def brevity(completions: Sequence[str], **columns: object) -> list[float]:
    return [1 / len(text) for text in completions]


def politeness(completions: Sequence[str], **columns: object) -> list[float | None]:
    return [0.5 if "so" in text else None for text in completions]


def vowels(completions: Sequence[str], **columns: object) -> list[float | None]:
    return [0.5 if set("aeiou") & set(text) else None for text in completions]


def nothing(completions: Sequence[str], **columns: object) -> list[None]:
    return [None] * len(completions)


def path(function: Callable) -> str:
    return f"{__name__}:{function.__name__}"


def rewarder(functions: dict[str, float], **options: object) -> Rewarder:
    return Rewarder(RewardConfig(functions=functions, num_workers=1, **options), "boxed")


def test_the_reward_is_the_weighted_sum_and_the_status_the_graders() -> None:
    """2 x correct + 0.5 / length - 1 x politeness, which some have none of."""
    functions = {"math": 2.0, path(brevity): 0.5, path(politeness): -1.0}
    with rewarder(functions, allow_none=True) as made:
        scores = made.score(TEXTS, PROBLEMS)
        info = made.info()
    assert [score.reward for score in scores] == pytest.approx([2 + 0.5 / 9, 0.5 / 12 - 0.5, 0.125])
    assert [score.status for score in scores] == ["correct", "wrong", "no_answer"]
    assert [score.parts for score in scores] == [
        {"math": 1.0, "brevity": 1 / 9},
        {"math": 0.0, "brevity": 1 / 12, "politeness": 0.5},
        {"math": 0.0, "brevity": 1 / 4},
    ]
    assert info["functions"] == functions
    assert info["answer_pattern"] == "boxed" and "correct_reward" not in info


def test_without_the_grader_the_sum_decides_what_is_correct() -> None:
    functions = {path(brevity): 12.0, path(politeness): 2.0}
    made = rewarder(functions, allow_none=True, correct_reward=2.0)
    assert not made.in_background
    scores = made.score(TEXTS, PROBLEMS)
    assert [score.reward for score in scores] == pytest.approx([12 / 9, 1 + 1, 3])
    assert [score.status for score in scores] == ["wrong", "correct", "correct"]
    assert made.info() == {"functions": functions, "correct_reward": 2.0}


def test_only_where_all_give_none_there_is_no_reward() -> None:
    functions = {path(politeness): 1.0, path(nothing): 1.0}
    scores = rewarder(functions, allow_none=True).score(TEXTS, PROBLEMS)
    assert [score.reward for score in scores] == [None, 0.5, None]
    assert [score.status for score in scores] == ["no_reward", "wrong", "no_reward"]
    message = rf"reward.functions '{path(politeness)}': expected a finite number, got None at 0"
    with pytest.raises(RewardError, match=message):
        rewarder(functions).score(TEXTS, PROBLEMS)


def test_one_function_of_weight_1_scores_as_when_it_is_alone() -> None:
    alone = Rewarder(RewardConfig(function=path(brevity), correct_reward=0.1), "boxed")
    among = rewarder({path(brevity): 1.0}, correct_reward=0.1)
    for one, other in zip(alone.score(TEXTS, PROBLEMS), among.score(TEXTS, PROBLEMS), strict=True):
        assert one == Score(reward=other.reward, status=other.status)


def test_the_grader_grades_while_others_are_generated_and_functions_come_last() -> None:
    graded = threading.Event()
    with rewarder({path(brevity): 0.5, "math": 1.0}) as made:
        grade, calls = made.grade, []
        made.grade = lambda *args: (grade(*args), graded.set())[0]
        made._functions[path(brevity)] = lambda completions, **columns: (
            calls.append(completions) or brevity(completions)
        )
        with Scoring(made, PROBLEMS) as scoring:
            scoring.add(2, TEXTS[2])
            scoring.add(0, TEXTS[0])
            assert graded.wait(timeout=60) and not calls
            scoring.add(1, TEXTS[1])
            scores = scoring.scores()
        assert calls == [TEXTS]
        assert scores == made.score(TEXTS, PROBLEMS)
    assert [score.status for score in scores] == ["correct", "wrong", "no_answer"]


def test_too_many_errors_of_the_grader_stop_a_run_with_several_rewards(monkeypatch) -> None:
    with rewarder({"math": 1.0, path(brevity): 1.0}) as made:
        monkeypatch.setattr(made._grader, "grade", lambda golds, answers: ["error"] * len(golds))
        with pytest.raises(RewardError, match="the grader failed on 2 of 3 responses"):
            made.score(TEXTS, PROBLEMS)


def test_each_has_its_own_mean_over_the_rollouts_that_it_gave_a_reward() -> None:
    functions = {path(brevity): 1.0, path(vowels): 1.0}
    trainer = make_trainer(
        {
            "rollout": {"group_size": 2, "max_response_length": 8},
            "trainer": {"prompts_per_step": 4, "prompts_per_update": 4, "num_steps": 5},
            "reward": {"functions": functions, "allow_none": True},
        }
    )
    trainer.sampler.rewarder = rewarder(functions, allow_none=True)
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    step_metrics = StepMetrics()
    measure_generated(step_metrics, groups)
    metrics = step_metrics.result()
    brief = [1 / len(rollout.text) for rollout in rollouts]
    num_with = sum(bool(set("aeiou") & set(rollout.text)) for rollout in rollouts)
    assert 0 < num_with < 8
    assert metrics["reward/brevity_mean"] == pytest.approx(sum(brief) / 8)
    assert metrics["reward/vowels_mean"] == 0.5
    assert metrics["reward/mean"] == pytest.approx((sum(brief) + 0.5 * num_with) / 8)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"function": "a:f", "functions": {"b:g": 1.0}},
            r"reward.functions: expected none beside reward.function \('a:f'\), got \{'b:g': 1.0\}",
        ),
        ({"functions": {"math": math.nan}}, "reward.functions: expected a table of numbers"),
        ({"functions": {"math": math.inf}}, "reward.functions: expected a table of numbers"),
        ({"functions": {"math": "1"}}, "reward.functions: expected a table of numbers"),
        ({"functions": {"a:f": 1.0, "b.f": 1.0}}, "functions of different names.*'a:f', 'b.f'"),
        ({"functions": {"math": 1.0, "a.math": 1.0}}, "functions of different names"),
        ({"functions": {"a:on_policy": 1.0}}, "other than .*on_policy.*'a:on_policy'"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"reward": section})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "reward.functions: cannot import 'no_such_module_here:f'"),
        ("grader", "reward.functions: expected package.module:function .* got 'grader'"),
        ("math:pi", "reward.functions: 'math:pi' is not callable"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        rewarder({"math": 1.0, name: 0.5})


def test_answers_are_checked_where_the_grader_is_asked() -> None:
    assert RewardConfig().weights == {"math": 1.0}
    assert RewardConfig(function="a:f").weights == {"a:f": 1.0}
    assert RewardConfig(functions={"a:f": 2}).weights == {"a:f": 2.0}


def test_the_table_survives_a_file(tmp_path) -> None:
    config = config_from_dict({"reward": {"functions": {"math": 1.0, "my.module:f": -0.25}}})
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
