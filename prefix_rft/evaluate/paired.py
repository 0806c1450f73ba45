"""Two models on the same problems: paired differences, and which problems changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefix_rft.evaluate.results import SuiteResult
from prefix_rft.evaluate.statistics import Estimate

COLUMNS = ("benchmark", "first", "second", "difference", "std. error", "95% interval", "n")


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two models on the problems of one suite."""

    label: str
    is_sampled: bool
    rows: np.ndarray  # [N] rows of the problems that both have
    first: np.ndarray  # [N] fraction of the samples that are correct
    second: np.ndarray

    @property
    def change(self) -> np.ndarray:
        return self.second - self.first


def compare(first: Sequence[SuiteResult], second: Sequence[SuiteResult]) -> list[Paired]:
    """The suites that both have, on the problems that both have."""
    others = {result.label: result for result in second}
    return [_paired(a, others[a.label]) for a in first if a.label in others]


def _paired(first: SuiteResult, second: SuiteResult) -> Paired:
    rows = [row for row in first.num_correct if row in second.num_correct]
    of_first, of_second = (
        np.array([result.num_correct[row] for row in rows]) / result.num_samples
        for result in (first, second)
    )
    return Paired(
        label=first.label,
        is_sampled=first.temperature > 0,
        rows=np.array(rows),
        first=of_first,
        second=of_second,
    )


def table_rows(pairs: Sequence[Paired]) -> list[tuple[str, ...]]:
    """Rows of COLUMNS, in percent and points; the last is the average of the sampled suites."""
    rows = [
        (
            pair.label,
            f"{100 * pair.first.mean():.1f}",
            f"{100 * pair.second.mean():.1f}",
            *_points(Estimate.of(pair.change)),
            str(len(pair.rows)),
        )
        for pair in pairs
    ]
    sampled = [pair.change for pair in pairs if pair.is_sampled]
    if len(sampled) > 1:
        name = f"average of {len(sampled)}"
        rows.append((name, "", "", *_points(Estimate.of_suites(sampled)), ""))
    return rows


def _points(estimate: Estimate) -> tuple[str, str, str]:
    low, high = estimate.ci95
    return (
        f"{100 * estimate.value:+.1f}",
        f"{100 * estimate.stderr:.1f}",
        f"{100 * low:+.1f} – {100 * high:+.1f}",
    )


def changes(pairs: Sequence[Paired], *, most: int = 20) -> list[str]:
    """Which problems changed, a line a suite."""

    def told(rows: Sequence[int]) -> str:
        more = ", ..." if len(rows) > most else ""
        return f"{len(rows)} ({', '.join(map(str, rows[:most]))}{more})" if len(rows) else "0"

    return [
        f"{pair.label}: rows that the second solves more often: "
        f"{told(pair.rows[pair.change > 0])}; less often: {told(pair.rows[pair.change < 0])}"
        for pair in pairs
    ]
