"""SIGINT and SIGTERM end a run at a safe point, the same on all ranks."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prefix_rft.checks import UserError
from prefix_rft.model import World

_SAME_SIGNAL_S = 1.0  # a launcher and the terminal may both pass on what was sent once


class Stopped(BaseException):
    """The user or the scheduler asked the run to end, by `signal`. Not an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Interrupt:
    """While entered, the first signal is remembered; a second one kills as it would without us."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, world: World | None = None) -> None:
        self.signal: int | None = None  # the one that came
        self._world = World() if world is None else world
        self._time = 0.0
        self._cancellable = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._time > _SAME_SIGNAL_S:
                self.__exit__()
                signal.raise_signal(number)
            return
        self.signal, self._time = number, time.monotonic()
        if self._cancellable:
            raise Stopped(number)

    @contextmanager
    def cancellable(self, *, at_once: bool = True) -> Iterator[None]:
        """A section that changes nothing worth keeping, and in which no rank waits for another.

        A signal or an error that the user can put right, on any rank, ends it on all: they meet at
        its end. Collective.

        Args:
            at_once: a signal need not wait for the end of the section.
        Raises:
            Stopped, UserError: that of the lowest rank that had one.
        """
        trouble: BaseException | None = None
        try:
            if self.signal is not None:
                raise Stopped(self.signal)
            self._cancellable = at_once
            yield
        except (Stopped, UserError) as error:
            trouble = error
        finally:
            self._cancellable = False
        for found in self._world.all_gather_object(trouble):
            if found is not None:
                raise found
