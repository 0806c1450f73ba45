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
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self, get_args

from prefix_rft.config import MATH, RewardConfig, function_name
from prefix_rft.data_types import Problem, RewardStatus
from prefix_rft.reward.grader import Grader, RewardError, extract_answer, grader_info
from prefix_rft.reward.spelling import clean_answer

RewardFunction = Callable[..., Sequence[float | None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward of a response; `correct` by the math grader or `reward.correct_reward`."""

    reward: float | None  # None: no function gave one, `no_reward`
    status: RewardStatus
    # by name of the function, before its weight; only with `reward.functions`
    parts: Mapping[str, float] = field(default_factory=dict)


def count_statuses(scores: Sequence[Score]) -> dict[RewardStatus, int]:
    """The number of scores with each status; all statuses are present."""
    counts = Counter(score.status for score in scores)
    return {status: counts[status] for status in get_args(RewardStatus)}


def load_reward_function(path: str, key: str = "reward.function") -> RewardFunction:
    """The function at `package.module:function` or `package.module.function`.

    The working directory is searched as well, last.

    Args:
        key: of the configuration, for the message.
    Raises:
        RewardError: it cannot be imported, or is not callable.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise RewardError(
            f"{key}: expected package.module:function or package.module.function, got {path!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{key}: cannot import {path!r}: {error}") from error
    if not callable(function):
        raise RewardError(f"{key}: {path!r} is not callable: {type(function).__name__}")
    return function


class Rewarder:
    """Scores responses with the math grader, with functions of the user's, or with both.

    The math grader gives 1 for a correct answer and 0 for anything else; its processes end with
    `close` or the end of a `with` block. Of several rewards the weighted sum is taken; a None adds
    nothing. Where the grader is among them its status is that of the response.

    Args:
        config: the section `[reward]`.
        answer_pattern: the `pattern` of `extract_answer`.

    Raises:
        RewardError: a function of the user's cannot be imported.
    """

    def __init__(self, config: RewardConfig, answer_pattern: str) -> None:
        self._config = config
        self._answer_pattern = answer_pattern
        self._key = "reward.functions" if config.functions else "reward.function"
        self._functions = {
            path: load_reward_function(path, self._key) for path in config.weights if path != MATH
        }
        self._grader = None
        if MATH in config.weights:
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
        """What decides the reward of a response, and whether it is correct, for a summary."""
        config, told = self._config, {}
        if config.functions:
            told["functions"] = dict(config.functions)
        elif config.function:
            told["function"] = config.function
        if self._grader is None:
            return told | {"correct_reward": config.correct_reward}
        return told | {"answer_pattern": self._answer_pattern, **grader_info()}

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
        graded = self.grade(completions, problems) if self.in_background else None
        return self.complete(graded, completions, problems)

    @property
    def in_background(self) -> bool:
        """Whether `grade`, which may run in a thread, must go before `complete`."""
        return self._grader is not None

    def grade(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[RewardStatus]:
        """The math grader's statuses, however many of them are errors."""
        answers = [extract_answer(text, self._answer_pattern) for text in completions]
        found = [i for i, answer in enumerate(answers) if answer is not None]
        golds = [clean_answer(problems[i].answer) for i in found]
        statuses: list[RewardStatus] = ["no_answer"] * len(answers)
        for i, status in zip(
            found, self._grader.grade(golds, [answers[i] for i in found]), strict=True
        ):
            statuses[i] = status
        return statuses

    def complete(
        self,
        statuses: Sequence[RewardStatus] | None,
        completions: Sequence[str],
        problems: Sequence[Problem],
    ) -> list[Score]:
        """The scores that follow from the grader's statuses and what the functions give now.

        Args:
            statuses: of `grade`; None where the grader is not asked.
        Raises:
            RewardError: see `score`.
        """
        rewards: dict[str, Sequence[float | None]] = {}
        for path in self._config.weights:  # in their order, and so the sum
            if path == MATH:
                self._check(statuses, completions, problems)
                rewards[path] = [float(status == "correct") for status in statuses]
            else:
                rewards[path] = self._ask(path, completions, problems)
        return [
            self._score(
                {path: column[i] for path, column in rewards.items()},
                None if statuses is None else statuses[i],
            )
            for i in range(len(completions))
        ]

    def _score(self, rewards: Mapping[str, float | None], graded: RewardStatus | None) -> Score:
        """Of the rewards of one response by path; `graded`: its status by the grader."""
        given = {path: reward for path, reward in rewards.items() if reward is not None}
        if not given:
            return Score(reward=None, status="no_reward")
        parts: dict[str, float] = {}
        if weights := self._config.functions:
            parts = {function_name(path): float(reward) for path, reward in given.items()}
            reward = sum(weights[path] * float(reward) for path, reward in given.items())
        else:
            [reward] = given.values()
        is_correct = reward >= self._config.correct_reward
        status = graded or ("correct" if is_correct else "wrong")
        return Score(reward=float(reward), status=status, parts=parts)

    def _check(
        self,
        statuses: Sequence[RewardStatus],
        completions: Sequence[str],
        problems: Sequence[Problem],
    ) -> None:
        """Raise RewardError if too many of the grader's statuses are errors."""
        errors = [i for i, status in enumerate(statuses) if status == "error"]
        if len(errors) > self._config.max_error_fraction * len(statuses):
            answer = extract_answer(completions[errors[0]], self._answer_pattern)
            example = f"{answer!r:.200} against {problems[errors[0]].answer!r:.200}"
            raise RewardError(
                f"the grader failed on {len(errors)} of {len(statuses)} responses, more than "
                f"reward.max_error_fraction = {self._config.max_error_fraction} allows, "
                f"such as {example}"
            )

    def _ask(
        self, path: str, completions: Sequence[str], problems: Sequence[Problem]
    ) -> Sequence[float | None]:
        """The rewards of the function at `path`, as it gives them, but checked."""
        name = f"{self._key} {path!r}"
        # Ours come last, so they replace columns of the same name.
        columns: dict[str, list[Any]] = {
            column: [problem.columns.get(column) for problem in problems]
            for column in dict.fromkeys(c for problem in problems for c in problem.columns)
            if column != "completions"
        }
        columns["prompts"] = [problem.prompt for problem in problems]
        columns["answer"] = [problem.answer for problem in problems]
        rewards = self._call(name, self._functions[path], completions, columns)
        if not hasattr(rewards, "__len__") or len(rewards) != len(completions):
            got = f"{len(rewards)}" if hasattr(rewards, "__len__") else f"{rewards!r:.100}"
            raise RewardError(f"{name}: expected a list of {len(completions)} rewards, got {got}")
        for i, reward in enumerate(rewards):
            if reward is None and self._config.allow_none:
                continue
            if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
                raise RewardError(f"{name}: expected a finite number, got {reward!r} at {i}")
        return rewards

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
