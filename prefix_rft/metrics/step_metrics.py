"""The metrics of one step while it runs: totals, means of many parts, time and memory by phase."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepMetrics:
    """Collects named figures."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []  # phases on CUDA, outermost first

    def add(self, name: str, value: float) -> None:
        """Add to a total."""
        self._totals[name] += float(value)

    def mean(self, name: str, total: float, count: float) -> None:
        """Add `count` items that sum to `total` to a mean; a mean of nothing is not reported."""
        self.add(name, total)
        self._counts[name] += float(count)

    def figure(self, name: str, total: float, count: float | None = None) -> None:
        """Add to a total, or, with a count, to a mean."""
        if count is None:
            self.add(name, total)
        else:
            self.mean(name, total, count)

    def maximum(self, name: str, value: float) -> None:
        """Keep the largest."""
        self._totals[name] = max(float(value), self._totals.get(name, float(value)))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Wall time of the block in seconds; on CUDA also the peak of allocated memory in MiB."""
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            # What an outer phase has seen so far is kept in its figure when it ends.
            self._raise_peaks()
            torch.cuda.reset_peak_memory_stats()
            self._open.append(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"time/{name}_s", time.perf_counter() - start)
            if on_cuda:
                self._raise_peaks()
                self._open.pop()

    def _raise_peaks(self) -> None:
        peak = torch.cuda.max_memory_allocated() / 2**20
        for name in self._open:
            self.maximum(f"memory/{name}_peak_mib", peak)

    def result(self) -> dict[str, float]:
        return {
            name: total / self._counts[name] if name in self._counts else total
            for name, total in self._totals.items()
            if self._counts.get(name) != 0
        }
