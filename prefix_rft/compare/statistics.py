"""Intervals: of a mean over seeds, and of a difference over problems."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from prefix_rft.evaluate import CONFIDENCE, bootstrap_interval


@dataclass(frozen=True)
class Estimate:
    """A mean of `num` values with its interval; one value has none."""

    mean: float
    num: int
    interval: tuple[float, float] | None


def t_estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` and its interval by Student's t with n - 1 degrees of freedom."""
    mean, n = fmean(values), len(values)
    if n == 1:
        return Estimate(mean, 1, None)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, n, (mean - half, mean + half))


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution with whole `degrees` of freedom stays within, +-."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    first = 1 + degrees % 2
    term, total = (1.0, 0.0) if first == 1 else (cosine, 0.0)
    for k in range(first, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    if degrees % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + sine * total)


def paired_estimate(
    ours: Sequence[Mapping[int, float]], theirs: Sequence[Mapping[int, float]]
) -> Estimate:
    """Mean difference of ours minus theirs over problems, with a bootstrap over problems.

    A problem's value is its mean over seeds; it counts where all of `ours` and `theirs` have it.

    Args:
        ours, theirs: for each seed, a value by the index of the problem.
    Raises:
        ValueError: they have no problem in common.
    """
    both = [*ours, *theirs]
    indices = sorted(set(both[0]).intersection(*both[1:]))
    if not indices:
        raise ValueError("ours, theirs: expected problems that all have, got none")
    differences = [
        fmean(each[index] for each in ours) - fmean(each[index] for each in theirs)
        for index in indices
    ]
    low, high = bootstrap_interval(np.array(differences))
    return Estimate(fmean(differences), len(indices), (low, high))
