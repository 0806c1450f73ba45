"""The grader's worker process: questions on stdin, replies on stdout, one JSON value per line.

It is started by file path and imports nothing of this package, so that it never loads torch. A
question is `{"gold": text, "answer": text or null}`. The reply is `true` or `false`: whether the
answer matches the gold answer or, without an answer, whether the gold answer parses. The first
output line is `"ready"`.
"""

import contextlib
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
    grader.sympy_solve_and_compare = lambda a, b, *_: relations_agree(a, b)


def relations_agree(a: Any, b: Any) -> bool:
    """Whether two equations or inequalities are the same but for a constant factor.

    Math-Verify solves them, which may take minutes, and takes two without a solution for the same.
    """
    from sympy import Eq, Float, Ne, prime

    sides = [relation.lhs - relation.rhs for relation in (a, b)]
    names = sorted({symbol.name for side in sides for symbol in side.free_symbols})
    ratios = []
    for start, sign in ((4, 1), (11, -1), (19, 1)):
        point = {name: Float(sign**i * prime(start + i), DIGITS) for i, name in enumerate(names, 1)}
        try:
            values = [
                side.evalf(DIGITS, subs={s: point[s.name] for s in side.free_symbols})
                for side in sides
            ]
            ratio = values[0] / values[1]
        except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
            return False
        if not ratio.is_Float or not ratio.is_finite or ratio == 0:
            return False
        ratios.append(ratio)
    if any(abs(ratio - ratios[0]) > EXACT * abs(ratio) for ratio in ratios):
        return False
    expected = a.func if ratios[0] > 0 or isinstance(a, Eq | Ne) else a.reversed.func
    return b.func is expected


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

    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy, normalize_latex
    from math_verify import LatexExtractionConfig, grader, parser, verify

    logging.disable(logging.CRITICAL)
    decide_values(grader, tolerance)
    # A parser has no other door to the mode it is made with.
    ParserATNSimulator.predictionMode = property(lambda self: self.mode, lambda self, mode: None)
    latex = LatexExtractionConfig()
    # Units are read before; Math-Verify's list of them takes the variables c, d, s and t for some.
    without_units = replace(latex.normalization_config, units=False)

    @functools.lru_cache(maxsize=512)
    def parsed(text: str, is_complex: bool) -> list:
        """The value of the whole text, and the text.

        Math-Verify's own `parse` may take a part of the text that it can read for the whole.
        """
        normalized = normalize_latex(text, config=without_units)
        for tried in dict.fromkeys((normalized, parser.get_last_eq(normalized))):
            for mode in (PredictionMode.SLL, PredictionMode.LL):
                # What the fast mode reads it reads as the slow one does.
                ParserATNSimulator.mode = mode
                with contextlib.suppress(Exception):  # whatever is raised about an odd text
                    options = {"convert_degrees": False, "normalization_config": None}
                    return [latex2sympy(tried, is_real=not is_complex, **options), normalized]
        return [normalized]

    def matches(gold: str, answer: str) -> bool:
        # Real and complex symbols differ, whatever their names.
        is_complex = any(map(parser.should_treat_as_complex, (gold, answer)))
        return verify(parsed(gold, is_complex), parsed(answer, is_complex), timeout_seconds=None)

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
        # SIGPROF's default action ends the process: no worker outlives a parent that was killed.
        signal.setitimer(signal.ITIMER_PROF, timeout_s + 1.0)
        if question["answer"] is None:
            reply(any(not isinstance(value, str) for value in parsed(question["gold"], False)))
        else:
            reply(matches(question["gold"], question["answer"]))
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
