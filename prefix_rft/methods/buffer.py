"""Problems that wait for an update on their demonstrations; a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefix_rft.data_types import Problem

_KEPT = ("index", "prompt", "prompt_ids", "answer", "demonstration", "demonstration_ids")


class Buffer:
    """What waits before the latest step and after it: one that is cancelled can be repeated."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Problem]] = {0: []}  # by the step that begins with it

    def __len__(self) -> int:
        return len(self._waiting[max(self._waiting)])

    def take(self, step: int, new: Sequence[Problem], size: int) -> list[Problem]:
        """Put `new` in front, in their order, and take the first `size`; none if there are fewer.

        A problem that is already there is not looked for: it is there twice.
        """
        before = self._waiting[step]
        waiting = [*new, *before]
        taken = waiting[:size] if len(waiting) >= size else []
        self._waiting = {step: before, step + 1: waiting[len(taken) :]}
        return taken

    def state(self) -> dict[str, Any]:
        return {
            str(step): [{name: getattr(problem, name) for name in _KEPT} for problem in waiting]
            for step, waiting in self._waiting.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._waiting = {int(step): [*map(_problem, kept)] for step, kept in state.items()}


def _problem(kept: Mapping[str, Any]) -> Problem:
    """JSON has lists where a problem has tuples."""
    return Problem(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
