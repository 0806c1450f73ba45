"""Rewards of a group -> advantages of its rollouts. Pure.

Sources: arXiv 2507.01679, Eq. 3; Dr. GRPO, arXiv 2503.20783 (no standard deviation); GRPO, arXiv
2402.03300 (with it).
"""

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

Baseline = Literal["joint", "exclude_hybrid"]
AdvantageScale = Literal["none", "std", "batch_std"]
STD_EPS = 1e-6


class Advantage(NamedTuple):
    """Advantages of one rollout, the same on every token of the named part."""

    continuation: float
    prefix: float

    def over(self, scale: float) -> "Advantage":
        return Advantage(self.continuation / scale, self.prefix / scale)


def reward_scale(rewards: Sequence[float]) -> float:
    """The standard deviation of the rewards (n - 1 in the denominator) plus `STD_EPS`."""
    return (statistics.stdev(rewards) if len(rewards) > 1 else 0.0) + STD_EPS


def group_advantages(
    rewards: Sequence[float],
    is_hybrid: Sequence[bool],
    *,
    baseline: Baseline = "joint",
    drop_negative_prefix: bool = False,
) -> list[Advantage]:
    """Advantages of the G rollouts of one prompt.

    `joint`: A = R - mean of all rewards, prefix included. `exclude_hybrid`: the mean is that of the
    on-policy rollouts; a hybrid's continuation has A = R, its prefix R - that mean. A group whose
    rewards are all equal, or in which none is left for the baseline, has A = 0 everywhere.
    """
    has_baseline = baseline == "joint" or not all(is_hybrid)
    if len(set(rewards)) <= 1 or not has_baseline:
        return [Advantage(0.0, 0.0)] * len(rewards)

    if baseline == "joint":
        mean = sum(rewards) / len(rewards)
        advantages = [Advantage(reward - mean, reward - mean) for reward in rewards]
    else:
        on_policy = [r for r, hybrid in zip(rewards, is_hybrid, strict=True) if not hybrid]
        mean = sum(on_policy) / len(on_policy)
        advantages = [
            Advantage(reward if hybrid else reward - mean, reward - mean)
            for reward, hybrid in zip(rewards, is_hybrid, strict=True)
        ]
    if drop_negative_prefix:
        advantages = [Advantage(a.continuation, max(a.prefix, 0.0)) for a in advantages]
    return advantages
