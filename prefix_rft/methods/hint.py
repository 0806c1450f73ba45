"""The part of a demonstration that all rollouts of a group continue: its length, and its loss.

Source: arXiv 2505.16984 and its code, whose data lists the steps of a demonstration. Here the steps
are the lines of its text that are not empty, and the cut is in token ids, at the same fraction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from prefix_rft.checks import Fraction, config_section, require
from prefix_rft.data_types import Problem
from prefix_rft.methods.grpo import clipped_loss
from prefix_rft.methods.mixture import bounded_ratio

if TYPE_CHECKING:
    import torch

HORIZON = 0.6  # of the steps of a run: 300 of the published 500


@config_section("hint")
class HintOptions:
    """The fields that the section of a method with hints begins with."""

    max_chunks: PositiveInt = 5  # parts that a demonstration is cut in; fewer if it has fewer lines
    low: Fraction = 0.05  # probability of a part at the end of the schedule
    high: Fraction = 0.95  # probability of a part at its beginning
    # steps until there are no hints any more; None: 0.6 of the run's
    horizon_steps: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        require(self.low <= self.high, f"{self.key}.low", f"at most high ({self.high})", self.low)

    def probability(self, step: int, num_steps: int) -> float:
        """Of each part to be in the hint, at `step`, counted from 0; the cosine counts from 1."""
        horizon = HORIZON * num_steps if self.horizon_steps is None else self.horizon_steps
        t = step + 1
        if t >= horizon:
            return 0.0
        return self.low + 0.5 * (self.high - self.low) * (1 + math.cos(math.pi * t / horizon))

    def hint(
        self, problem: Problem, probability: float, rng: np.random.Generator, max_tokens: int
    ) -> tuple[int, ...]:
        """As many of the first parts as draws of that probability succeed, one for each part."""
        num_chunks = min(self.max_chunks, num_lines(problem))
        num_drawn = int((rng.random(num_chunks) < probability).sum())
        length = len(problem.demonstration_ids)
        num_tokens = length * num_drawn // max(1, num_chunks)
        return problem.demonstration_ids[: min(num_tokens, max_tokens)]


def num_lines(problem: Problem) -> int:
    """The lines of the demonstration that are not empty; one where it has only ids."""
    if not problem.demonstration_ids:
        return 0
    return max(1, sum(bool(line.strip()) for line in (problem.demonstration or "").splitlines()))


def hint_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    is_hint: torch.Tensor,
    ref_log_probs: torch.Tensor | None = None,
    *,
    clip: float,
    nll: float,
    entropy_coef: float,
    kl_coef: float,
) -> torch.Tensor:
    """-log_probs on hints; the clipped objective, entropy and KL on what the policy wrote."""
    losses = clipped_loss(log_probs, old_log_probs, advantages, clip=clip) - entropy_coef * entropy
    if ref_log_probs is not None:
        kl = bounded_ratio(ref_log_probs, log_probs) - 1 + log_probs - ref_log_probs
        losses = losses + kl_coef * kl
    return (-nll * log_probs).where(is_hint, losses)
