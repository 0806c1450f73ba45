"""Rewards of a step's responses, graded while others are still being generated."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Self

from prefix_rft.data_types import Problem, RewardStatus
from prefix_rft.reward.reward import Rewarder, Score


class Scoring:
    """Takes responses as they arrive, in any order; use as a context manager.

    The math grader grades in a thread; reward functions of the user's are called once, by `scores`,
    with all responses in order.
    """

    def __init__(self, rewarder: Rewarder, problems: Sequence[Problem]) -> None:
        self._rewarder = rewarder
        self._problems = problems
        self._texts: list[str] = [""] * len(problems)
        self._statuses: list[RewardStatus | None] = [None] * len(problems)
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._grading = self._executor.submit(self._grade) if rewarder.in_background else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._queue.put(None)
        self._executor.shutdown()

    def add(self, index: int, text: str) -> None:
        """Add the response to `problems[index]`."""
        self._texts[index] = text
        self._queue.put(index)

    def scores(self) -> list[Score]:
        """One score for each problem, once all responses have been added.

        Raises:
            RewardError: see `Rewarder.score`.
        """
        if self._grading is None:
            return self._rewarder.score(self._texts, self._problems)
        self._queue.put(None)
        self._grading.result()
        return self._rewarder.complete(self._statuses, self._texts, self._problems)

    def _grade(self) -> None:
        """Grade in batches whatever has arrived, until None arrives."""
        while True:
            picks = [self._queue.get()]
            while None not in picks:
                try:
                    picks.append(self._queue.get_nowait())
                except Empty:
                    break
            done = [i for i in picks if i is not None]
            statuses = self._rewarder.grade(
                [self._texts[i] for i in done], [self._problems[i] for i in done]
            )
            for i, status in zip(done, statuses, strict=True):
                self._statuses[i] = status
            if None in picks:
                return
