"""The rewards of a generation, as TRL gathers them, to advantages of prefix and continuation."""

import math
import statistics
from collections.abc import Sequence

from prefix_rft.methods import Advantage, PrefixRFTConfig, group_advantages

STD_EPS = 1e-4  # TRL's


def generation_advantages(
    rewards: Sequence[float],
    is_hybrid: Sequence[bool],
    options: PrefixRFTConfig,
    *,
    group_size: int,
    scale: str,
) -> list[Advantage]:
    """The advantages of the rollouts of all groups, in order.

    Args:
        rewards: NaN where no reward function had one: that rollout is left out of its group, and
            its advantages are 0.
        scale: "none", "group" or "batch": what the standard deviation is taken over.
    """
    scored = [reward for reward in rewards if not math.isnan(reward)]
    advantages: list[Advantage] = []
    for start in range(0, len(rewards), group_size):
        places = [i for i in range(start, start + group_size) if not math.isnan(rewards[i])]
        own = [rewards[i] for i in places]
        found = group_advantages(
            own,
            [is_hybrid[i] for i in places],
            baseline=options.advantage,
            drop_negative_prefix=options.drop_negative_prefix_advantage,
        )
        divisor = 1.0 if scale == "none" else _std(own if scale == "group" else scored) + STD_EPS
        by_place = dict(zip(places, found, strict=True))
        advantages += [
            by_place.get(i, Advantage(0.0, 0.0)).over(divisor)
            for i in range(start, start + group_size)
        ]
    return advantages


def _std(rewards: Sequence[float]) -> float:
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0
