"""The metrics of one step while it runs: totals, means of many parts, wall time by phase."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """Collects named figures."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, value: float) -> None:
        """Add to a total."""
        self._totals[name] += float(value)

    def mean(self, name: str, total: float, count: float) -> None:
        """Add `count` items that sum to `total` to a mean; a mean of nothing is not reported."""
        self.add(name, total)
        self._counts[name] += float(count)

    def maximum(self, name: str, value: float) -> None:
        """Keep the largest."""
        self._totals[name] = max(float(value), self._totals.get(name, float(value)))

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the wall time of the block, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def result(self) -> dict[str, float]:
        return {
            name: total / self._counts[name] if name in self._counts else total
            for name, total in self._totals.items()
            if self._counts.get(name) != 0
        }
