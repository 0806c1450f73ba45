"""Runs as child processes, n at a time, each with its log."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefix_rft.compare.comparison import Run
from prefix_rft.compare.results import is_done
from prefix_rft.config import save_config
from prefix_rft.train import live_holder

LOG_FILE = "log.txt"
CELL_FILE = "cell.toml"  # the configuration that the child is started with
NUM_LAST_LINES = 10  # of the log of a run that failed
_LOOK_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXEC = str(Path(__file__).with_name("with_parent.py"))


class Jobs:
    """Child processes of `prefix-rft train`, at most `jobs` at a time.

    Args:
        launcher: put before `-m prefix_rft`, such as "torchrun --nproc-per-node 8"; None: python.
        tell: prints a line.
    """

    def __init__(self, *, jobs: int, launcher: str | None, tell: Callable[[str], None]) -> None:
        self.jobs = jobs
        self.command = [sys.executable] if launcher is None else shlex.split(launcher)
        self.tell = tell
        self._children: dict[Run, subprocess.Popen] = {}
        self._began: dict[Run, float] = {}

    def run_all(
        self,
        runs: Sequence[Run],
        *,
        began: Callable[[Run], None],
        ended: Callable[[Run, float], None],
    ) -> dict[str, str]:
        """Do what is left of `runs`, each after the one that it starts from.

        Args:
            began: called before a run is started or resumed.
            ended: called with a run that is done now, and the seconds that it took.
        Returns:
            why, for each run that could not be done, by its name. Others go on.
        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; all children have saved and ended.
        """
        waiting = [run for run in runs if not is_done(run)]
        failures: dict[str, str] = {}
        with _interruptible():
            try:
                while waiting or self._children:
                    self._drop_hopeless(waiting, failures)
                    for run in self._ready(waiting)[: self.jobs - len(self._children)]:
                        waiting.remove(run)
                        began(run)
                        self._start(run)
                    for run in self._finished():
                        self._end(run, ended, failures)
                    if self._children:
                        time.sleep(_LOOK_S)
            except BaseException:  # whatever ends this, the children end with it
                self._stop()
                raise
        return failures

    def _ready(self, waiting: Sequence[Run]) -> list[Run]:
        return [run for run in waiting if run.start is None or is_done(run.start)]

    def _drop_hopeless(self, waiting: list[Run], failures: dict[str, str]) -> None:
        for run in list(waiting):  # a run stands behind its start
            if run.start is not None and run.start.name in failures:
                waiting.remove(run)
                failures[run.name] = f"not begun, since {run.start.name} failed"
                self.tell(f"{run.name}: {failures[run.name]}")

    def _start(self, run: Run) -> None:
        self._await_orphan(run)
        save_config(run.config, run.folder / CELL_FILE)
        train = ["-m", "prefix_rft", "train", str(run.folder / CELL_FILE), "--resume"]
        environment = dict(os.environ)
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _num_cpus() // self.jobs)))
        with (run.folder / LOG_FILE).open("ab") as log:
            log.write(f"--- {shlex.join([*self.command, *train])}\n".encode())
            log.flush()
            self._began[run] = time.monotonic()
            self._children[run] = subprocess.Popen(
                [sys.executable, _EXEC, str(os.getpid()), *self.command, *train],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )

    def _await_orphan(self, run: Run) -> None:
        """A run of a comparison that was killed may still be saving."""
        told = False
        while (pid := live_holder(run.folder)) is not None:
            if not told:
                self.tell(f"{run.name}: waiting for process {pid}, which has the run, to end")
                told = True
            time.sleep(_LOOK_S)

    def _finished(self) -> list[Run]:
        return [run for run, child in self._children.items() if child.poll() is not None]

    def _end(self, run: Run, ended: Callable[[Run, float], None], failures: dict[str, str]) -> None:
        status = self._children.pop(run).returncode
        if status == 0 and is_done(run):
            ended(run, time.monotonic() - self._began.pop(run))
            return
        how = "ended before it was done" if status == 0 else f"failed with status {status}"
        failures[run.name] = f"{how}, see {run.folder / LOG_FILE}:\n{last_lines(run)}"
        self.tell(f"{run.name}: {how}")

    def _stop(self) -> None:
        """End the children: the first signal lets them save, a second one does not."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                for run, child in self._children.items():
                    if child.poll() is None:
                        self.tell(f"{run.name}: {signal.Signals(number).name}, waiting for its end")
                        child.send_signal(number)
                for child in self._children.values():
                    child.wait()
                return
            except KeyboardInterrupt:
                continue


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, in a shell's background job too."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _num_cpus() -> int:
    """Those that this process may use, where the system tells."""
    usable = getattr(os, "sched_getaffinity", lambda _: ())(0)
    return len(usable) or os.cpu_count() or 1


def last_lines(run: Run) -> str:
    """The end of the log of a run."""
    text = (run.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-NUM_LAST_LINES:])
