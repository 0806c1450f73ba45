"""The peak of memory in each phase of a step, on the device or, on a CPU, of the process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prefix_rft.metrics import StepMetrics

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PhasePeaks(StepMetrics):
    """Step metrics that know the peak of every phase in bytes, and which phase failed.

    On CUDA what torch has allocated; else resident memory of the process, which Linux counts anew
    for each phase, and other systems from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.peaks: dict[str, int] = {}  # in the order in which the phases first began
        self.failed: str | None = None  # the innermost phase that ended with an exception
        self._inside: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._note()
        self._inside.append(name)
        self.peaks.setdefault(name, 0)
        try:
            with super().phase(name):
                if self.device.type != "cuda":
                    _reset_resident_peak()
                yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self._note()
            self._inside.pop()

    def _note(self) -> None:
        """Keep what the open phases have seen up to now."""
        for name in self._inside:
            self.peaks[name] = max(self.peaks[name], self.peak_bytes())

    def peak_bytes(self) -> int:
        """Since the latest phase began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak()


def _resident_peak() -> int:
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_resident_peak() -> None:
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is that of the process until now
        return
