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

MIB = 2**20


def limit_memory(memory_mib: int) -> None:
    """Cap the address space at `memory_mib` above its current size; on Linux only."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        limit = in_use + memory_mib * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    timeout_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    # A library that prints must not break the protocol.
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    targets = (LatexExtractionConfig(), ExprExtractionConfig())

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
