"""One process at a time writes to a run folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import SoftFileLease, Timeout

from prefix_rft.checks import ConfigError, UserError
from prefix_rft.model import World

LOCK_FILE = "run.lock"
HOLDER_FILE = "run.lock.json"  # who holds it, for the message
HEARTBEAT_S = 5.0  # the holder touches its lock that often
SILENCE_S = 60.0  # without a heartbeat, a lock is its holder's no more; the same for all processes
_LOOK_S = 0.5


class LockedError(UserError):
    """Another process holds the run folder."""


class RunLock:
    """The lock of a run folder, held by rank 0; use through `held`.

    A lock whose holder has died on this machine is taken over at once, that of another machine when
    its heartbeat has stopped. It works where file creation is atomic, over NFS too.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._is_lost = False
        self._lease = SoftFileLease(
            run_dir / LOCK_FILE,
            lease_duration=SILENCE_S,
            heartbeat_interval=HEARTBEAT_S,
            on_compromise=self._lose,
        )

    def acquire(self) -> None:
        """Make the folder and take its lock, or wait for the holder's heartbeat and refuse.

        Raises:
            ConfigError: the folder cannot be written.
            LockedError: the holder is alive.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            first_beat = None
            while not self._is_acquired():
                beat = _modified(self.run_dir / LOCK_FILE)
                first_beat = first_beat or beat
                if beat not in (None, first_beat):
                    raise LockedError(
                        f"{self.run_dir} is in use by {self._holder()}: wait for its end, or "
                        "choose another --name or --output-dir"
                    )
                time.sleep(_LOOK_S)
            holder = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            }
            (self.run_dir / HOLDER_FILE).write_text(json.dumps(holder))
        except OSError as error:
            raise ConfigError(
                f"output_dir: expected a folder that can be written, got {self.run_dir} "
                f"({error.strerror})"
            ) from error

    def check(self) -> None:
        """Raise LockedError where another process has taken the folder over meanwhile."""
        if self._is_lost:
            raise LockedError(
                f"{self.run_dir} was taken over by {self._holder()}: this process was silent for "
                f"more than {SILENCE_S:.0f} s, or its lock was deleted"
            )

    def release(self) -> None:
        if self._lease.is_lock_held_by_us:
            (self.run_dir / HOLDER_FILE).unlink(missing_ok=True)
        self._lease.release()

    def _is_acquired(self) -> bool:
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def _holder(self) -> str:
        try:
            holder = json.loads((self.run_dir / HOLDER_FILE).read_text())
        except (OSError, json.JSONDecodeError):  # it is being written, or deleted
            return "another process"
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"

    def _lose(self, _: object) -> None:
        self._is_lost = True


@contextmanager
def held(run_dir: Path, world: World) -> Iterator[RunLock]:
    """Hold the lock of `run_dir` on rank 0. Collective at its start."""
    lock = RunLock(run_dir)
    world.broadcast(lock.acquire)
    try:
        yield lock
    finally:
        lock.release()


def live_holder(run_dir: Path) -> int | None:
    """The process on this machine that holds a run folder and gives signs of life; None: none."""
    try:
        holder = json.loads((run_dir / HOLDER_FILE).read_text())
        beat = (run_dir / LOCK_FILE).stat().st_mtime
        if holder["host"] != socket.gethostname() or time.time() - beat > 3 * HEARTBEAT_S:
            return None
        os.kill(holder["pid"], 0)
    except (FileNotFoundError, json.JSONDecodeError, ProcessLookupError, PermissionError):
        return None
    return holder["pid"]


def _modified(path: Path) -> float | None:
    """When `path` was last touched; opened, since file systems of a network cache what is not."""
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None
