"""Rewards: a response and its problem -> a number and a status."""

import importlib
import logging
import math
import numbers
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self, get_args

from prefix_rft.config import RewardConfig
from prefix_rft.data_types import Problem, RewardStatus
from prefix_rft.reward.grader import Grader, RewardError, extract_answer, grader_info
from prefix_rft.reward.spelling import clean_answer

RewardFunction = Callable[..., Sequence[float | None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward of a response; `correct` from `reward.correct_reward` on, for all figures."""

    reward: float | None  # None: the function gave none, `no_reward`
    status: RewardStatus


def count_statuses(scores: Sequence[Score]) -> dict[RewardStatus, int]:
    """The number of scores with each status; all statuses are present."""
    counts = Counter(score.status for score in scores)
    return {status: counts[status] for status in get_args(RewardStatus)}


def load_reward_function(path: str) -> RewardFunction:
    """The function at `package.module:function` or `package.module.function`.

    The working directory is searched as well, last.

    Raises:
        RewardError: it cannot be imported, or is not callable.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise RewardError(
            "reward.function: expected package.module:function or package.module.function, "
            f"got {path!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward.function: cannot import {path!r}: {error}") from error
    if not callable(function):
        raise RewardError(f"reward.function: {path!r} is not callable: {type(function).__name__}")
    return function


class Rewarder:
    """Scores responses with the math grader or with `reward.function`.

    The math grader gives 1 for a correct answer and 0 for anything else; its processes end with
    `close` or the end of a `with` block.

    Args:
        config: the section `[reward]`.
        answer_pattern: the `pattern` of `extract_answer`.

    Raises:
        RewardError: the user's function cannot be imported.
    """

    def __init__(self, config: RewardConfig, answer_pattern: str) -> None:
        self._config = config
        self._answer_pattern = answer_pattern
        self._function = load_reward_function(config.function) if config.function else None
        self._grader = None
        if self._function is None:
            self._grader = Grader(
                num_workers=config.num_workers,
                timeout_s=config.timeout_s,
                memory_mib=config.memory_mib,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._grader is not None:
            self._grader.close()

    def info(self) -> dict[str, Any]:
        """What decides whether a response is correct, for a summary."""
        if self._function is not None:
            config = self._config
            return {"function": config.function, "correct_reward": config.correct_reward}
        return {"answer_pattern": self._answer_pattern, **grader_info()}

    def has_answer(self, text: str) -> bool:
        """Whether `text` has a final answer, right or wrong."""
        return extract_answer(text, self._answer_pattern) is not None

    def score(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[Score]:
        """One score per completion.

        Args:
            completions: decoded responses, including their prefix.
            problems: the problem of each completion.

        Raises:
            RewardError: too many grader errors, or invalid rewards from a user's function.
        """
        if len(completions) != len(problems):
            raise ValueError(
                f"problems: expected one for each of {len(completions)} completions, "
                f"got {len(problems)}"
            )
        if not completions:
            return []
        if self._function is not None:
            return self._score_by_function(self._function, completions, problems)
        scores = self.grade(completions, problems)
        self.check(scores, completions, problems)
        return scores

    @property
    def in_background(self) -> bool:
        """Whether `grade`, which may run in a thread, and then `check` can replace `score`."""
        return self._grader is not None

    def grade(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[Score]:
        """The math grader's scores, however many of them are errors."""
        answers = [extract_answer(text, self._answer_pattern) for text in completions]
        found = [i for i, answer in enumerate(answers) if answer is not None]
        golds = [clean_answer(problems[i].answer) for i in found]
        statuses: list[RewardStatus] = ["no_answer"] * len(answers)
        for i, status in zip(
            found, self._grader.grade(golds, [answers[i] for i in found]), strict=True
        ):
            statuses[i] = status
        return [Score(reward=float(status == "correct"), status=status) for status in statuses]

    def check(
        self, scores: Sequence[Score], completions: Sequence[str], problems: Sequence[Problem]
    ) -> None:
        """Raise RewardError if too many of the grader's scores are errors."""
        errors = [i for i, score in enumerate(scores) if score.status == "error"]
        if len(errors) > self._config.max_error_fraction * len(scores):
            answer = extract_answer(completions[errors[0]], self._answer_pattern)
            example = f"{answer!r:.200} against {problems[errors[0]].answer!r:.200}"
            raise RewardError(
                f"the grader failed on {len(errors)} of {len(scores)} responses, more than "
                f"reward.max_error_fraction = {self._config.max_error_fraction} allows, "
                f"such as {example}"
            )

    def _score_by_function(
        self, function: RewardFunction, completions: Sequence[str], problems: Sequence[Problem]
    ) -> list[Score]:
        name = f"reward.function {self._config.function!r}"
        # Ours come last, so they replace columns of the same name.
        columns: dict[str, list[Any]] = {
            column: [problem.columns.get(column) for problem in problems]
            for column in dict.fromkeys(c for problem in problems for c in problem.columns)
            if column != "completions"
        }
        columns["prompts"] = [problem.prompt for problem in problems]
        columns["answer"] = [problem.answer for problem in problems]
        rewards = self._call(name, function, completions, columns)
        if not hasattr(rewards, "__len__") or len(rewards) != len(completions):
            got = f"{len(rewards)}" if hasattr(rewards, "__len__") else f"{rewards!r:.100}"
            raise RewardError(f"{name}: expected a list of {len(completions)} rewards, got {got}")
        for i, reward in enumerate(rewards):
            if reward is None and self._config.allow_none:
                continue
            if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
                raise RewardError(f"{name}: expected a finite number, got {reward!r} at {i}")
        return [self._score(reward) for reward in rewards]

    def _score(self, reward: float | None) -> Score:
        if reward is None:
            return Score(reward=None, status="no_reward")
        is_correct = reward >= self._config.correct_reward
        return Score(reward=float(reward), status="correct" if is_correct else "wrong")

    def _call(
        self,
        name: str,
        function: RewardFunction,
        completions: Sequence[str],
        columns: Mapping[str, list[Any]],
    ) -> Sequence[float | None]:
        """The function's rewards, after `reward.retries` further calls at most.

        Raises:
            RewardError: the last call raised an exception; its traceback is below the first line.
        """
        for retry in count():
            try:
                return function(completions=list(completions), **columns)
            except Exception as error:  # whatever the user's code raises
                first_line = str(error).partition("\n")[0]
                told = f"{name} raised {type(error).__name__}: {first_line}"
                if retry == self._config.retries:
                    trace = "".join(traceback.format_exception(error)).rstrip()
                    raise RewardError(f"{told}\n\n{trace}") from error
                wait_s = self._config.retry_wait_s * 2**retry
                _log.warning("%s; calling it again in %g s", told, wait_s)
                time.sleep(wait_s)
