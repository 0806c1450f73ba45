"""Intervals against worked examples."""

from itertools import product
from statistics import fmean

import numpy as np
import pytest

from prefix_rft.compare.statistics import paired_estimate, t_estimate, t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),  # from a printed table of Student's t, 97.5%
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (60, 2.000)],
)
def test_quantiles_are_those_of_the_table(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def test_quantile_of_another_confidence() -> None:
    assert t_quantile(5, 0.99) == pytest.approx(4.032, abs=5e-4)


def test_interval_over_seeds_is_that_of_a_worked_example() -> None:
    # mean 0.5, standard deviation 0.1, t of 2 degrees 4.3027: half width 0.24841
    estimate = t_estimate([0.4, 0.5, 0.6])
    assert (estimate.mean, estimate.num) == (pytest.approx(0.5), 3)
    assert estimate.interval == pytest.approx((0.25159, 0.74841), abs=1e-5)
    assert t_estimate([0.3]).interval is None


def test_paired_interval_is_that_of_all_resamples() -> None:
    """Two problems have four resamples: the interval ends at the outer ones, 25% each."""
    ours = [{3: 1.0, 5: 0.5, 9: 1.0}, {3: 1.0, 5: 0.0}]
    theirs = [{3: 0.0, 5: 0.5}, {3: 1.0, 5: 0.25, 7: 0.0}]
    differences = {3: 0.5, 5: 0.25 - 0.375}
    estimate = paired_estimate(ours, theirs)
    means = sorted(fmean(pair) for pair in product(differences.values(), repeat=2))
    assert (estimate.mean, estimate.num) == (pytest.approx(0.1875), 2)
    assert estimate.interval == pytest.approx((means[0], means[-1]))


def test_pairing_takes_out_what_problems_have_in_common() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.uniform(size=400)
    ours = {i: float(x + 0.05) for i, x in enumerate(hardness)}
    theirs = {i: float(x) for i, x in enumerate(hardness)}
    low, high = paired_estimate([ours], [theirs]).interval
    assert (low, high) == (pytest.approx(0.05), pytest.approx(0.05))


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="problems that all have"):
        paired_estimate([{1: 1.0}], [{2: 1.0}])
