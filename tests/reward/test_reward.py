"""Scores from the math grader and from a user's function, and the errors that stop a run."""

import math

import numpy as np
import pytest
import torch

from prefix_rft.checks import UserError
from prefix_rft.config.sections import RewardConfig
from prefix_rft.data_types import Problem
from prefix_rft.reward import grader as grader_module
from prefix_rft.reward.grader import RewardError
from prefix_rft.reward.reward import Rewarder, count_statuses, load_reward_function


def make_problem(answer: str, /, **columns) -> Problem:
    return Problem(index=0, prompt=f"for {answer}", prompt_ids=(1,), answer=answer, columns=columns)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes functions into a uniquely named module on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def function_rewarder(path: str) -> Rewarder:
    return Rewarder(RewardConfig(function=path), "boxed")


def test_math_scores_and_their_counts():
    texts = [
        r"\boxed{0.5}",
        r"\boxed{1/3}",
        "it is one half",
        r"<think>\boxed{0.5}</think> I do not know",
        rf"\boxed{{{'(' * 2000}1{')' * 2000}}}",
        r"\boxed{2/4} or \boxed{\frac12}",
        r"\boxed{0.5} or rather \boxed{5}",
    ]
    with Rewarder(RewardConfig(timeout_s=2.0), "boxed") as rewarder:
        scores = rewarder.score(texts, [make_problem(r"$\frac{1}{2}$")] * len(texts))
        assert rewarder.score([], []) == []
        assert rewarder.has_answer(texts[1]) and not rewarder.has_answer(texts[2])
    statuses = ["correct", "wrong", "no_answer", "no_answer", "wrong", "correct", "wrong"]
    assert [score.status for score in scores] == statuses
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    counts = {"correct": 2, "wrong": 3, "no_answer": 2, "timeout": 0, "error": 0, "no_reward": 0}
    assert count_statuses(scores) == counts


def test_each_completion_is_graded_against_its_own_problem():
    with Rewarder(RewardConfig(num_workers=1), "####") as rewarder:
        texts = ["#### 1", "#### 2", "#### 1/2", "none"]
        scores = rewarder.score(texts, [make_problem(a) for a in ("1", "3", "0.5", "1")])
    assert [s.status for s in scores] == ["correct", "wrong", "correct", "no_answer"]


@pytest.fixture
def dying_worker(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\nprint('\"ready\"', flush=True)\nsys.stdin.readline()\nsys.exit(1)\n"
    )
    monkeypatch.setattr(grader_module, "_worker_file", worker)


@pytest.mark.parametrize(("max_error_fraction", "stops"), [(0.49, True), (0.5, False)])
def test_too_many_grader_errors_stop_the_run(dying_worker, max_error_fraction, stops):
    texts = [r"\boxed{x}", r"\boxed{y}", r"\boxed{1}", "nothing"]
    with Rewarder(RewardConfig(max_error_fraction=max_error_fraction), "boxed") as rewarder:
        if stops:
            message = r"failed on 2 of 4 responses.*max_error_fraction = 0\.49.*'x' against '1'"
            with pytest.raises(RewardError, match=message):
                rewarder.score(texts, [make_problem("1")] * 4)
        else:
            scores = rewarder.score(texts, [make_problem("1")] * 4)
            assert [s.status for s in scores] == ["error", "error", "correct", "no_answer"]
            assert [s.reward for s in scores] == [0.0, 0.0, 1.0, 0.0]


def test_completions_and_problems_have_to_match():
    with (
        Rewarder(RewardConfig(num_workers=1), "boxed") as rewarder,
        pytest.raises(ValueError, match="problems: expected one for each of 2 completions, got 1"),
    ):
        rewarder.score(["a", "b"], [make_problem("1")])


SEEN = """
def remember(completions, **columns):
    calls.append((completions, columns))
    return [len(c) - 1 for c in completions]

calls = []
"""


@pytest.mark.parametrize("form", ["{}:remember", "{}.remember"])
def test_a_users_function_gets_aligned_columns(user_module, form):
    name = user_module("seen_colon" if ":" in form else "seen_dot", SEEN)
    problems = [
        make_problem("1", level=3, answer="#### 1", completions="taken"),
        make_problem("2", source="web", answer="#### 2"),
    ]
    scores = function_rewarder(form.format(name)).score(["a", "bcd"], problems)
    assert [s.reward for s in scores] == [0.0, 2.0]
    assert [s.status for s in scores] == ["wrong", "correct"]
    ((completions, columns),) = __import__(name).calls
    assert completions == ["a", "bcd"]
    assert columns == {
        "level": [3, None],
        "source": [None, "web"],
        "prompts": ["for 1", "for 2"],
        "answer": ["1", "2"],
    }


def test_a_function_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "here_only.py").write_text("def f(completions, **columns):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_reward_function("here_only:f")(completions=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ([1, 0.5], True),
        ((True, False), True),
        (np.array([1.0, 0.0], dtype=np.float32), True),
        ([1.0, math.nan], False),
        ([1.0, math.inf], False),
        ([1.0, None], False),
        ([1.0, "1"], False),
        ([1.0, torch.tensor(1.0)], False),
        ([1.0], False),
        ([1.0] * 3, False),
        (1.0, False),
        (None, False),
    ],
    ids=repr,
)
def test_what_a_users_function_may_return(user_module, value, accepted):
    name = user_module("returns", "def f(completions, **columns):\n    return value\n")
    module = __import__(name)
    module.value = value
    rewarder = function_rewarder("returns.f")
    problems = [make_problem("1")] * 2
    if accepted:
        assert [s.reward for s in rewarder.score(["a", "b"], problems)] == [float(v) for v in value]
    else:
        with pytest.raises(RewardError, match=r"reward\.function 'returns\.f': expected"):
            rewarder.score(["a", "b"], problems)


def test_a_nan_reward_is_named_with_its_place(user_module):
    user_module("gives_nan", "def f(completions, **columns):\n    return [0.0, float('nan')]\n")
    with pytest.raises(RewardError, match="'gives_nan:f': expected a finite number, got nan at 1"):
        function_rewarder("gives_nan:f").score(["a", "b"], [make_problem("1")] * 2)


def test_an_exception_of_a_users_function_is_one_line_above_its_traceback(user_module):
    user_module("fails", "def f(completions, **columns):\n    return {}['missing']\n")
    with pytest.raises(RewardError) as caught:
        function_rewarder("fails:f").score(["a"], [make_problem("1")])
    line, blank, *below = str(caught.value).split("\n")
    assert line == "reward.function 'fails:f' raised KeyError: 'missing'"
    assert blank == "" and below[0].startswith("Traceback") and "return {}['missing']" in str(below)


FAILS_TWICE = """
calls = []

def f(completions, **columns):
    calls.append(completions)
    completions.clear()
    if len(calls) <= 2:
        raise ConnectionError("judge\\nis away")
    return [1.0] * 2
"""


@pytest.mark.parametrize("retries", [1, 2])
def test_a_function_that_raises_is_called_again(user_module, monkeypatch, caplog, retries):
    name = user_module(f"fails_twice_{retries}", FAILS_TWICE)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    config = RewardConfig(function=f"{name}:f", retries=retries, retry_wait_s=0.5)
    rewarder, problems = Rewarder(config, "boxed"), [make_problem("1")] * 2
    if retries == 2:
        assert [score.reward for score in rewarder.score(["a", "b"], problems)] == [1.0, 1.0]
    else:
        with pytest.raises(RewardError, match=r"raised ConnectionError: judge\n\nTraceback"):
            rewarder.score(["a", "b"], problems)
    assert waits == [0.5, 1.0][:retries]
    assert "raised ConnectionError: judge; calling it again in 0.5 s" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_not_tried_again(user_module, error):
    source = f"def f(completions, **columns):\n    raise {error.__name__}\n"
    path = user_module(f"raises_{error.__name__}", source) + ":f"
    rewarder = Rewarder(RewardConfig(function=path, retries=3, retry_wait_s=0), "boxed")
    with pytest.raises(error):
        rewarder.score(["a"], [make_problem("1")])


@pytest.mark.parametrize("allow_none", [True, False])
def test_none_is_no_reward_where_that_is_asked_for(user_module, allow_none):
    user_module("gives_none", "def f(completions, **columns):\n    return [1.0, None]\n")
    config = RewardConfig(function="gives_none:f", allow_none=allow_none)
    rewarder, problems = Rewarder(config, "boxed"), [make_problem("1")] * 2
    if allow_none:
        scores = rewarder.score(["a", "b"], problems)
        assert [(s.reward, s.status) for s in scores] == [(1.0, "correct"), (None, "no_reward")]
    else:
        with pytest.raises(RewardError, match="expected a finite number, got None at 1"):
            rewarder.score(["a", "b"], problems)


@pytest.mark.parametrize(("least", "correct"), [(1.0, [0, 0, 1, 1]), (0.5, [0, 1, 1, 1])])
def test_a_graded_reward_is_correct_from_a_threshold_on(user_module, least, correct):
    user_module("graded", "def f(completions, **columns):\n    return [0.4, 0.9, 1.0, 2]\n")
    rewarder = Rewarder(RewardConfig(function="graded:f", correct_reward=least), "boxed")
    scores = rewarder.score(["a"] * 4, [make_problem("1")] * 4)
    assert [score.reward for score in scores] == [0.4, 0.9, 1.0, 2.0]
    assert [score.status == "correct" for score in scores] == [bool(c) for c in correct]
    assert rewarder.info() == {"function": "graded:f", "correct_reward": least}


def test_a_summary_names_the_versions_and_choices_of_the_grader():
    with Rewarder(RewardConfig(num_workers=1), "####") as rewarder:
        info = rewarder.info()
    assert info["answer_pattern"] == "####" and info["relative_tolerance"] == 1e-6
    assert info["math-verify"].count(".") == 2 and info["rules"] >= 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here:f': No module named"),
        ("math:no_such", "cannot import 'math:no_such'.*no attribute 'no_such'"),
        ("math:pi", "'math:pi' is not callable: float"),
        ("function", "expected package.module:function .* got 'function'"),
        ("math:", "expected package.module:function .* got 'math:'"),
        (":f", "expected package.module:function .* got ':f'"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_clear_error(path, message):
    with pytest.raises(RewardError, match=message) as caught:
        function_rewarder(path)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
