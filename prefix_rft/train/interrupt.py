"""SIGINT and SIGTERM end a run at a safe point, the same one on all ranks."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prefix_rft.checks import UserError
from prefix_rft.model import World

_SAME_SIGNAL_S = 1.0  # launcher and terminal may both deliver one signal


class Stopped(BaseException):
    """The user or the scheduler asked the run to end, with `signal`. Not an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Interrupt:
    """While entered, the first signal is remembered; a second one has its default effect."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, world: World | None = None) -> None:
        self.signal: int | None = None  # the one received
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
        """A section whose results can be discarded, and in which no rank waits for another.

        If any rank gets a signal or a UserError, all ranks raise it at the end of the section.
        Collective.

        Args:
            at_once: on the rank that gets it, a signal ends the section immediately.
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
