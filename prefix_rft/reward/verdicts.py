"""The grader on its own: any number of answers, or the lines of a file, against gold answers."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prefix_rft.checks import UserError
from prefix_rft.data_types import RewardStatus
from prefix_rft.reward.grader import Grader, extract_answer
from prefix_rft.reward.spelling import clean_answer


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer was graded."""

    status: RewardStatus
    extracted: str | None  # the answer in the grader's spelling; None: `no_answer`
    rule: str  # by which it was decided, see `Decision`


def grade(
    answers: Sequence[str],
    golds: Sequence[str],
    *,
    answer_pattern: str | None = None,
    num_workers: int = 2,
    timeout_s: float = 5.0,
    memory_mib: int = 1024,
) -> list[Verdict]:
    """One verdict for each answer, given its gold answer.

    Args:
        answers: final answers; whole responses with an `answer_pattern`.
        golds: the gold answer of each.
        answer_pattern: where a response has its answer, the `pattern` of `extract_answer`.
        num_workers: processes with Math-Verify.
        timeout_s: seconds that one answer may take there.
        memory_mib: MiB that one of them may use.

    Raises:
        ValueError: the numbers of answers and gold answers differ.
        RewardError: a process cannot be started.
    """
    if len(answers) != len(golds):
        raise ValueError(
            f"golds: expected one for each of {len(answers)} answers, got {len(golds)}"
        )
    with Grader(num_workers=num_workers, timeout_s=timeout_s, memory_mib=memory_mib) as grader:
        pairs = zip(answers, golds, strict=True)
        return list(verdicts(grader, pairs, answer_pattern=answer_pattern))


def verdicts(
    grader: Grader, pairs: Iterable[tuple[str, str]], *, answer_pattern: str | None = None
) -> Iterator[Verdict]:
    """A verdict for each pair of an answer and a gold answer, in order and one after another."""
    extracted: dict[int, str | None] = {}

    def cleaned() -> Iterator[tuple[str, str | None]]:
        for i, (answer, gold) in enumerate(pairs):
            extracted[i] = extract_answer(answer, answer_pattern)
            yield clean_answer(gold), extracted[i]

    for i, decision in enumerate(grader.decisions(cleaned())):
        yield Verdict(status=decision.status, extracted=extracted.pop(i), rule=decision.rule)


def grade_file(
    path: Path, *, answer_pattern: str, num_workers: int, timeout_s: float, memory_mib: int
) -> None:
    """Grade a file of JSON lines: a JSON line for each to stdout, in order, a summary to stderr.

    The file is read twice, so that a line that cannot be read is told before any work.

    Raises:
        UserError: see `read_pairs`.
        RewardError: a grader process cannot be started.
    """
    for _ in read_pairs(path):
        pass
    statuses: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    start = time.monotonic()
    with Grader(num_workers=num_workers, timeout_s=timeout_s, memory_mib=memory_mib) as grader:
        for verdict in verdicts(grader, read_pairs(path), answer_pattern=answer_pattern):
            print(json.dumps(asdict(verdict)))
            statuses[verdict.status] += 1
            rules[verdict.rule] += 1
    sys.stdout.flush()
    number, seconds = statuses.total(), time.monotonic() - start
    told = [", ".join(f"{n} {name}" for name, n in c.most_common()) for c in (statuses, rules)]
    share = f", {statuses['correct'] / number:.1%} correct" if number else ""
    print(
        f"{number} answers in {seconds:.1f} s{share}: {told[0] or 'none'}\n"
        f"decided by: {told[1] or 'nothing'}",
        file=sys.stderr,
    )


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The response and the gold answer on each line of a file of JSON objects.

    Raises:
        UserError: there is no such file, or a line is no object with the two texts.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _pair(f"{path}, line {number}", line)


def _pair(where: str, line: bytes) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got {line[:60]!r} ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {line[:60]!r}")
    for key in ("answer", "response"):
        if not isinstance(row.get(key), str):
            got = repr(row[key])[:60] if key in row else f"only {', '.join(row) or 'no keys'}"
            raise UserError(f"{where}: expected a text under {key!r}, got {got}")
    return row["response"], row["answer"]
