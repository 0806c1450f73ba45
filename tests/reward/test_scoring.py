"""Grading during generation: the same scores, with errors counted over the whole step."""

import threading

import pytest

from prefix_rft.config.sections import RewardConfig
from prefix_rft.data_types import Problem
from prefix_rft.reward.grader import RewardError
from prefix_rft.reward.reward import Rewarder
from prefix_rft.reward.scoring import Scoring


def problem(index: int) -> Problem:
    return Problem(index=index, prompt="?", prompt_ids=(1,), answer=str(index))


def test_scores_are_those_of_the_whole_step_whatever_the_order() -> None:
    problems = [problem(i) for i in range(6)]
    texts = [f"\\boxed{{{i if i % 2 else i + 7}}}" for i in range(5)] + ["nothing"]
    with Rewarder(RewardConfig(num_workers=1), "boxed") as rewarder:
        with Scoring(rewarder, problems) as scoring:
            for i in (4, 0, 5, 2, 1, 3):
                scoring.add(i, texts[i])
            scores = scoring.scores()
        assert scores == rewarder.score(texts, problems)
    assert [score.status for score in scores[:2]] == ["wrong", "correct"]


def test_grading_does_not_wait_for_the_last_response() -> None:
    graded = threading.Event()
    with Rewarder(RewardConfig(num_workers=1), "boxed") as rewarder:
        grade = rewarder.grade
        rewarder.grade = lambda *args: (grade(*args), graded.set())[0]
        with Scoring(rewarder, [problem(0), problem(1)]) as scoring:
            scoring.add(0, r"\boxed{0}")
            assert graded.wait(timeout=60)
            scoring.add(1, r"\boxed{1}")
            assert [score.reward for score in scoring.scores()] == [1.0, 1.0]


def test_the_fraction_of_errors_is_that_of_the_step(monkeypatch) -> None:
    with Rewarder(RewardConfig(num_workers=1, max_error_fraction=0.4), "boxed") as rewarder:
        for num_errors, is_refused in ((1, False), (2, True)):
            monkeypatch.setattr(
                rewarder._grader,
                "grade",
                lambda golds, answers: ["error" if int(g) < num_errors else "wrong" for g in golds],  # noqa: B023
            )
            with Scoring(rewarder, [problem(i) for i in range(4)]) as scoring:
                for i in range(4):
                    scoring.add(i, r"\boxed{x}")
                if is_refused:
                    with pytest.raises(RewardError, match="failed on 2 of 4 responses"):
                        scoring.scores()
                else:
                    assert scoring.scores()[0].status == "error"


def test_a_users_function_is_called_once_with_everything_in_order() -> None:
    calls = []
    config = RewardConfig(function="tests.tiny:even_length")
    with Rewarder(config, "boxed") as rewarder:
        [(path, function)] = rewarder._functions.items()
        rewarder._functions[path] = lambda completions, **c: (
            calls.append(completions) or function(completions)
        )
        with Scoring(rewarder, [problem(0), problem(1)]) as scoring:
            scoring.add(1, "abc")
            scoring.add(0, "ab")
            assert [score.reward for score in scoring.scores()] == [1.0, 0.0]
    assert calls == [["ab", "abc"]]


def test_leaving_early_ends_the_thread() -> None:
    num_threads = threading.active_count()
    with Rewarder(RewardConfig(num_workers=1), "boxed") as rewarder:
        with pytest.raises(KeyboardInterrupt), Scoring(rewarder, [problem(0)] * 2) as scoring:
            scoring.add(0, r"\boxed{0}")
            raise KeyboardInterrupt
    assert threading.active_count() == num_threads
