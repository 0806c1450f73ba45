"""How much of a demonstration a hybrid rollout starts from: its options, the schedules, the cut.

Source: arXiv 2507.01679, section 3 (window with a cosine-decaying lower end).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from prefix_rft.checks import Fraction, config_section, require
from prefix_rft.data_types import Problem, RolloutRequest

Schedule = Literal["cosine_window", "cosine", "linear_window", "uniform", "constant"]


@config_section("prefix")
class PrefixOptions:
    """The fields that the sections of methods with hybrid rollouts begin with."""

    num_hybrid: NonNegativeInt = 1  # rollouts of a group that start from a prefix
    schedule: Schedule = "cosine_window"  # how the prefixes shorten over the steps
    low: Fraction = 0.05  # shortest prefix, as a fraction of the demonstration
    high: Fraction = 0.95  # longest prefix, as a fraction of the demonstration
    horizon_steps: PositiveInt | None = None  # steps of the schedule; None: those of the run
    min_prefix_tokens: PositiveInt = 1  # tokens of a prefix at least
    shared_prefix: bool = False  # whether all hybrid rollouts of a group start from one prefix
    # groups that have them: all, or those whose ordinary rollouts, which come first, all fail
    when: Literal["always", "group_fails"] = "always"

    def __post_init__(self) -> None:
        require(self.low <= self.high, f"{self.key}.low", f"at most high ({self.high})", self.low)

    def window(self, step: int, num_steps: int) -> tuple[float, float]:
        """The interval of prefix ratios at `step` of a run of `num_steps`."""
        horizon_steps = self.horizon_steps or num_steps
        return prefix_window(
            step,
            schedule=self.schedule,
            low=self.low,
            high=self.high,
            horizon_steps=horizon_steps,
        )

    def requests(
        self,
        problem: Problem,
        window: tuple[float, float],
        rng: np.random.Generator,
        max_response_length: int,
    ) -> list[RolloutRequest]:
        """The hybrid rollouts of a group, with ratios drawn from the window."""
        num_draws = 1 if self.shared_prefix else self.num_hybrid
        drawn = [
            self.request(problem, rng.uniform(*window), max_response_length)
            for _ in range(num_draws)
        ]
        return drawn * self.num_hybrid if self.shared_prefix else drawn[::-1]

    def request(self, problem: Problem, ratio: float, max_response_length: int) -> RolloutRequest:
        """A rollout that starts from that fraction of the problem's demonstration."""
        prefix_ids = cut_prefix(
            problem.demonstration_ids,
            ratio,
            min_tokens=self.min_prefix_tokens,
            max_response_length=max_response_length,
        )
        return RolloutRequest(
            prompt_ids=problem.prompt_ids,
            prefix_ids=prefix_ids,
            max_new_tokens=max_response_length - len(prefix_ids),
        )


def prefix_window(
    step: int, *, schedule: Schedule, low: float, high: float, horizon_steps: int
) -> tuple[float, float]:
    """The interval from which the prefix ratio of `step` (counted from 0) is drawn.

    `cosine_window` and `linear_window` let the lower end fall from `high` to `low` over
    `horizon_steps` and keep the upper end; `cosine` moves both ends together; `uniform` is
    [low, high] throughout; `constant` is always `high`.
    """
    progress = min(step / horizon_steps, 1.0)
    cosine = low + 0.5 * (high - low) * (1 + math.cos(math.pi * progress))
    match schedule:
        case "cosine_window":
            return cosine, high
        case "linear_window":
            return high - (high - low) * progress, high
        case "cosine":
            return cosine, cosine
        case "uniform":
            return low, high
        case "constant":
            return high, high


def cut_prefix(
    demonstration_ids: Sequence[int], ratio: float, *, min_tokens: int, max_response_length: int
) -> tuple[int, ...]:
    """The first floor(ratio * len) tokens, at least `min_tokens`, never the whole demonstration.

    Raises:
        ValueError: the demonstration has fewer than 2 tokens, or the prefix leaves no room in the
            response for a continuation.
    """
    length = len(demonstration_ids)
    if length < 2:
        raise ValueError(f"demonstration_ids: expected at least 2 tokens to cut, got {length}")
    num_tokens = min(max(math.floor(ratio * length), min_tokens), length - 1)
    if num_tokens >= max_response_length:
        raise ValueError(
            f"prefix: expected fewer than max_response_length = {max_response_length} tokens, "
            f"got {num_tokens} of a demonstration of {length}"
        )
    return tuple(demonstration_ids[:num_tokens])
