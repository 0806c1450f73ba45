"""Whether a text has the gold answer: extraction, a fast path, Math-Verify in killable processes.

Imports neither torch nor transformers, and Math-Verify only inside the worker processes.
"""

import importlib.metadata
import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

from prefix_rft.checks import UserError
from prefix_rft.reward.answers import (
    MAX_ANSWER_CHARS,
    Decision,
    decide,
    plain_number,
    read_answer,
)
from prefix_rft.reward.number import RELATIVE_TOLERANCE
from prefix_rft.reward.spelling import clean_answer, last_boxed

if TYPE_CHECKING:
    from prefix_rft.data_types import RewardStatus

RULES_VERSION = 2  # raised with every change by which an answer can be graded differently
LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
MAX_RAW_CHARS = 16 * 1024  # of an answer before it is cleaned; a longer one is not
AHEAD = 64  # answers that are read ahead of the oldest without a decision, a worker
WALL_FACTOR = 20.0  # times the processor time of an answer that it may take by the clock
START_TIMEOUT_S = 120.0  # for a worker process to get ready for its first question

_log = logging.getLogger(__name__)
_worker_file = Path(__file__).with_name("worker.py")


class RewardError(UserError):
    """Rewards cannot be computed or trusted; the run stops."""


def grader_info() -> dict[str, str | int | float]:
    """Versions and choices by which answers are graded."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return versions | {
        "rules": RULES_VERSION,
        "relative_tolerance": float(RELATIVE_TOLERANCE),
    }


def extract_answer(text: str, pattern: str | None) -> str | None:
    r"""The cleaned answer of a response, or None if it has no answer.

    Only the text after the last `</think>` is searched, or all of it without one. An answer of more
    than `MAX_RAW_CHARS` is not cleaned; it is wrong in any case.

    Args:
        text: the response.
        pattern: "boxed" for the last balanced `\boxed{}`, or a marker such as "####" for the rest
            of the line after its last occurrence; None: the text is the answer.
    """
    if pattern is None:
        found = text
    elif pattern == "boxed":
        found = last_boxed(text.rpartition("</think>")[2])
    else:
        _, marker, rest = text.rpartition("</think>")[2].rpartition(pattern)
        found = rest.strip().partition("\n")[0] if marker else None
    if found is None or len(found) > MAX_RAW_CHARS:
        return found
    return clean_answer(found) or None


class _Worker:
    """A worker process; `task` is its question, `deadline` the time at which to look after it.

    What it may take is processor time: on a busy machine a reply that is a matter of milliseconds
    can be seconds away, and gradings must not depend on that.
    """

    def __init__(self, timeout_s: float, memory_mib: int) -> None:
        arguments = (timeout_s, memory_mib, float(RELATIVE_TOLERANCE))
        # Its own process group, so that Ctrl-C in the terminal does not reach it. -P keeps the
        # modules of this folder from shadowing others.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_worker_file), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.is_ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._started = (0.0, 0.0)  # processor and wall time when it was asked

    def ask(self, task: int, timeout_s: float) -> None:
        self.task = task
        self._started = (self._processor_s() or 0.0, time.monotonic())
        self.deadline = self._started[1] + timeout_s

    def extend(self, timeout_s: float) -> bool:
        """Move the deadline to where the processor time may be used up; False: it is."""
        used_s, start = self._processor_s(), self._started[1]
        if self.task is None or used_s is None:
            return False
        left_s = timeout_s - (used_s - self._started[0])
        last = start + WALL_FACTOR * timeout_s
        self.deadline = min(time.monotonic() + left_s, last)
        return left_s > 0 and time.monotonic() < last

    def _processor_s(self) -> float | None:
        """Seconds that the process has run; None where that is not known, as on macOS."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def end(self) -> str:
        """Kill the process and return what it wrote to stderr before it was ready."""
        self.process.kill()
        self.process.wait()
        errors = self.process.stderr.read().decode(errors="replace")
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(BrokenPipeError):
                stream.close()
        return errors.strip()


def _question(pair: tuple[str, str | None]) -> dict[str, str] | Decision:
    """A decision, or the question for a worker."""
    gold, answer = pair
    if answer is None:
        return Decision("no_answer", "no_answer")
    decision = decide(gold, answer)
    if decision is not None:
        return decision
    return {"gold": read_answer(gold).text, "answer": read_answer(answer).text}


class Grader:
    """Math-Verify in `num_workers` processes.

    A worker that hangs or dies costs only its own answer and is replaced. The processes start right
    away in the background, serve until `close` (or the end of a `with` block), and end by
    themselves when this process is gone. Not thread-safe.

    Args:
        num_workers: number of processes.
        timeout_s: processor seconds per answer (seconds where those are not known).
        memory_mib: MiB by which a worker's address space may grow after start (only on Linux).
    """

    def __init__(self, *, num_workers: int, timeout_s: float, memory_mib: int) -> None:
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(num_workers):
            self._start_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in tuple(self._workers):
            self._drop(worker)
        self._selector.close()

    def grade(self, golds: Sequence[str], answers: Sequence[str]) -> list["RewardStatus"]:
        """correct, wrong, timeout or error for each cleaned answer, given its cleaned gold answer.

        Raises:
            RewardError: a worker cannot be started.
        """
        pairs = zip(golds, answers, strict=True)
        return [decision.status for decision in self.decisions(pairs)]

    def decisions(self, pairs: Iterable[tuple[str, str | None]]) -> Iterator[Decision]:
        """For each pair of a cleaned gold answer and a cleaned answer, in order.

        Only some pairs are read ahead of the one whose decision is next, so any number of them can
        be graded.

        Raises:
            RewardError: a worker cannot be started.
        """
        words = {True: "correct", False: "wrong"}
        with closing(self._ask(map(_question, pairs))) as replies:
            for reply in replies:
                if isinstance(reply, Decision):
                    yield reply
                else:
                    yield Decision(words.get(reply, reply), "math_verify")

    def parseable(self, golds: Sequence[str]) -> list[bool]:
        """For each cleaned gold answer, whether answers can be compared with it.

        Raises:
            RewardError: a worker cannot be started.
        """
        hard = list(dict.fromkeys(g for g in golds if plain_number(g) is None))
        short = [gold for gold in hard if len(gold) <= MAX_ANSWER_CHARS]
        texts = (read_answer(gold).text for gold in short)
        replies = self._ask({"gold": text, "answer": None} for text in texts)
        parsed = {gold: reply is True for gold, reply in zip(short, replies, strict=True)}
        return [plain_number(gold) is not None or parsed.get(gold, False) for gold in golds]

    def _start_worker(self) -> None:
        worker = _Worker(self._timeout_s, self._memory_mib)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _drop(self, worker: _Worker) -> str:
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        return worker.end()

    def _ask(self, questions: Iterable[dict | Decision]) -> Iterator[bool | str | Decision]:
        """The reply to each question, in order: the worker's, or "timeout" or "error".

        What is decided already goes through as it is.
        """
        unread = enumerate(questions)
        replies: dict[int, bool | str | Decision] = {}
        asked: dict[int, dict] = {}
        waiting: deque[int] = deque()
        num_read = num_out = 0
        try:
            while True:
                room = AHEAD * len(self._workers) - (num_read - num_out)
                for i, question in islice(unread, room):
                    num_read = i + 1
                    if isinstance(question, Decision):
                        replies[i] = question
                    else:
                        asked[i] = question
                        waiting.append(i)
                if num_out == num_read:
                    return
                self._hand_out(asked, waiting)
                while num_out in replies:
                    yield replies.pop(num_out)
                    num_out += 1
                for task, reply in self._collect() if num_out < num_read else ():
                    question, replies[task] = asked.pop(task), reply
                    if reply in ("timeout", "error"):
                        _log.info("grader %s on %.200r", reply, question)
        finally:
            # After an exception: a late reply must not be taken for that of the next question.
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._replace(worker)

    def _hand_out(self, questions: dict[int, dict], waiting: deque[int]) -> None:
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not waiting:
                return
            worker.ask(waiting[0], self._timeout_s)
            try:
                worker.process.stdin.write(json.dumps(questions[worker.task]).encode() + b"\n")
                worker.process.stdin.flush()
            except BrokenPipeError:  # it died while idle; the question stays at the head
                self._replace(worker)
            else:
                waiting.popleft()

    def _collect(self) -> list[tuple[int, bool | str]]:
        """Wait for the next reply, death or deadline; return the tasks that ended."""
        ended = []
        deadlines = [worker.deadline for worker in self._workers if not worker.is_idle]
        wait_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
        for key, _ in self._selector.select(wait_s):
            worker = key.data
            # A reply is one short line, written at once.
            line = worker.process.stdout.readline()
            if not line:
                if worker.task is not None:
                    ended.append((worker.task, "error"))
                self._replace(worker)
            elif worker.is_ready:
                ended.append((worker.task, json.loads(line)))
                worker.task = None
            else:
                worker.is_ready = True
        now = time.monotonic()
        for worker in [w for w in self._workers if not w.is_idle and w.deadline <= now]:
            if worker.extend(self._timeout_s):
                continue
            if worker.task is not None:
                ended.append((worker.task, "timeout"))
            self._replace(worker, f"not ready after {START_TIMEOUT_S:g} s")
        return ended

    def _replace(self, worker: _Worker, why: str = "it ended") -> None:
        errors = self._drop(worker)
        if not worker.is_ready:
            raise RewardError(f"a grader process did not start: {why}. {errors}".strip())
        self._start_worker()
