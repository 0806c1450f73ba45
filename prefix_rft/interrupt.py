"""SIGINT and SIGTERM end a run at a safe point instead of in the middle of an update."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The user or the scheduler asked the run to end, by `signal`. Not an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Interrupt:
    """While entered, the first signal is remembered; a second one kills as it would without us."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that came
        self._abandonable = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in self.SIGNALS:
            signal.signal(each, self._previous[each])
        if self._abandonable:
            raise Stopped(number)

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.signal is not None:
            raise Stopped(self.signal)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A section that changes nothing worth keeping: a signal ends it at once."""
        self.check()
        self._abandonable = True
        try:
            yield
        finally:
            self._abandonable = False
