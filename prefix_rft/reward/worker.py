"""The grader's worker process: questions on stdin, replies on stdout, one JSON value per line.

It is started by file path and imports nothing of this package, so that it never loads torch. A
question is `{"gold": text, "answer": text or null}`. The reply is `true` or `false`: whether the
answer matches the gold answer or, without an answer, whether the gold answer parses. The first
output line is `"ready"`.
"""

import functools
import json
import logging
import os
import resource
import signal
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

MIB = 2**20
DIGITS = 30  # that two exact values are computed to
EXACT = 1e-25  # their relative difference at most
SELF_TEST = (
    (r"\frac{1}{2}", "0.5", True),
    ("1", "2", False),
    ("1/2018!", "1/2021!", False),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
)


def limit_memory(memory_mib: int) -> None:
    """Cap the address space at `memory_mib` above its current size; on Linux only."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        limit = in_use + memory_mib * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def decide_values(grader: ModuleType, tolerance: float) -> None:
    """Let `values_agree` decide before Math-Verify's own comparisons of two expressions.

    Math-Verify compares six decimals, and drops terms that are small.
    """
    numeric_eq, symbolic_eq = grader.sympy_numeric_eq, grader.sympy_symbolic_eq

    def decide(a: Any, b: Any) -> bool | None:
        is_percent = grader.get_pct_val(a) is not None or grader.get_pct_val(b) is not None
        return None if is_percent else values_agree(a, b, tolerance)

    def numeric(a: Any, b: Any, *options: Any) -> bool:
        agree = decide(a, b)
        return numeric_eq(a, b, *options) if agree is None else agree

    def symbolic(a: Any, b: Any) -> bool:
        return decide(a, b) is not False and symbolic_eq(a, b)

    grader.sympy_numeric_eq, grader.sympy_symbolic_eq = numeric, symbolic


def values_agree(a: Any, b: Any, tolerance: float) -> bool | None:
    """Whether two expressions have the same value; None where that cannot be told.

    They have it exactly, or, with a decimal among them, within the relative tolerance. With
    variables, a difference at one point tells that they differ, and nothing that they agree.
    """
    from sympy import Abs, Expr, Float, Rational, prime

    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return None
    # By name: the two sides may hold a variable under different assumptions.
    names = sorted({symbol.name for side in (a, b) for symbol in side.free_symbols})
    point = {name: Float(prime(4 + i), DIGITS) for i, name in enumerate(names)}
    has_decimal = a.has(Float) or b.has(Float)
    try:
        values = [
            side.evalf(DIGITS, subs={symbol: point[symbol.name] for symbol in side.free_symbols})
            for side in (a, b)
        ]
        parts = [part for value in values for part in value.atoms(Float)]
        # Without finite values, or with no digits left after cancellation, nothing is told.
        if any(not value.is_finite for value in values) or any(part._prec < 10 for part in parts):
            return None
        difference, *sizes = (Abs(x).evalf() for x in (values[0] - values[1], *values))
        if difference > (tolerance if has_decimal else EXACT) * max(sizes):
            return False
        if names:
            return None
        if not has_decimal:
            exact = [side.doit() for side in (a, b)]
            if all(isinstance(value, Rational) for value in exact):
                return exact[0] == exact[1]
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return True


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    timeout_s, memory_mib, tolerance = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    # A library that prints must not break the protocol.
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, grader, parse, verify

    logging.disable(logging.CRITICAL)
    decide_values(grader, tolerance)
    latex = LatexExtractionConfig()
    # Units are read before; Math-Verify's list of them takes the variables c, d, s and t for some.
    without_units = replace(latex.normalization_config, units=False)
    targets = (replace(latex, normalization_config=without_units), ExprExtractionConfig())

    @functools.lru_cache(maxsize=256)
    def parsed(text: str) -> list:
        return parse(f"${text}$", targets, parsing_timeout=None)

    def matches(gold: str, answer: str) -> bool:
        return verify(parsed(gold), parsed(answer), timeout_seconds=None)

    if not matches(r"\frac{1}{2}", "0.5") or matches("1", "2"):
        raise SystemExit("math_verify misgrades 1/2 = 0.5 or 1 = 2; is its version supported?")
    limit_memory(memory_mib)

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply("ready")
    os.dup2(null, 2)
    for line in sys.stdin:
        question = json.loads(line)
        # SIGALRM's default action ends the process: no worker outlives a parent that was killed.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1.0)
        if question["answer"] is None:
            reply(any(not isinstance(value, str) for value in parsed(question["gold"])))
        else:
            reply(matches(question["gold"], question["answer"]))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
