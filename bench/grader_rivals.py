"""Other ways to grade: equal texts, Math-Verify as it comes, and sympy alone.

    python -m bench.grader_rivals NAME SECONDS < questions > statuses

One JSON object {"gold": ..., "answer": ...} a line, one word a line back: correct or wrong.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.grader_labels import Label

RIVALS = ("exact", "math_verify", "sympy")
SECONDS = 5.0  # for one answer; a later one is wrong


def exact(gold: str, answer: str) -> bool:
    return gold.strip() == answer.strip()


def math_verify(gold: str, answer: str) -> bool:
    """With its defaults, the answer in the box that it looks for first."""
    from math_verify import parse, verify

    box = rf"\boxed{{{gold}}}", rf"\boxed{{{answer}}}"
    gold_value, value = (parse(text, parsing_timeout=None) for text in box)
    return verify(gold_value, value, timeout_seconds=None)


def sympy(gold: str, answer: str) -> bool:
    """Equal texts, or a difference that simplifies to zero."""
    if exact(gold, answer):
        return True
    from latex2sympy2_extended import latex2sympy
    from sympy import simplify

    values = [latex2sympy(text.replace("$", "")) for text in (gold, answer)]
    return simplify(values[0] - values[1]) == 0


class _TooLate(BaseException):
    """No Exception, so that no library takes it for one of its own."""


def statuses_of(name: str, found: list[Label]) -> list[str]:
    """The statuses of all labels by one grader, in a process of its own."""
    questions = "".join(json.dumps(each._asdict()) + "\n" for each in found)
    done = subprocess.run(
        [sys.executable, "-m", "bench.grader_rivals", name, str(SECONDS)],
        input=questions,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    return done.stdout.split()


def main() -> None:
    graders: dict[str, Callable[[str, str], bool]] = {
        "exact": exact,
        "math_verify": math_verify,
        "sympy": sympy,
    }
    logging.disable(logging.CRITICAL)
    graded, seconds = graders[sys.argv[1]], float(sys.argv[2])

    def stop(*_: object) -> None:
        raise _TooLate

    signal.signal(signal.SIGALRM, stop)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for libraries that print
    for line in sys.stdin:
        question = json.loads(line)
        is_equal = False
        # Whatever a library raises about an answer, the answer is not right for it.
        with contextlib.suppress(_TooLate, Exception):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            is_equal = bool(graded(question["gold"], question["answer"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write("correct\n" if is_equal else "wrong\n")
    out.flush()


if __name__ == "__main__":
    main()
