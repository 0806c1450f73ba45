"""The math grader: answers per second, hostile answers, and how often it is wrong, beside others.

    python -m bench.grader GOLDS.parquet [--out-folder FOLDER] [--only speed hostile accuracy]

GOLDS.parquet has a column `answer`. Writes grader.csv (speed and hostile answers) and
grader_accuracy.csv (shares of labelled answers that are graded wrongly, a row for each kind).
"""

import argparse
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.grader_labels import Label, labels, read_golds
from bench.grader_rivals import RIVALS, statuses_of
from bench.harness import machine, write_rows
from prefix_rft.reward import grade
from prefix_rft.reward.grader import Grader, extract_answer
from prefix_rft.reward.spelling import clean_answer
from tests.reward.hostile import hostile_answers

TIMEOUT_S = 2.0
MEMORY_MIB = 1024
NUM_WORKERS = 2


def speed_rows(golds: list[str], number: int) -> list[dict]:
    """Answers per second: in a row as they come, after all workers are ready."""
    mixes = {
        "gold answers": [(gold, gold) for gold in golds],
        "gold, rewrite, near miss, next gold": list(_mix(golds)),
    }
    rows = []
    with Grader(num_workers=NUM_WORKERS, timeout_s=5.0, memory_mib=MEMORY_MIB) as grader:
        while not all(worker.is_ready for worker in grader._workers):
            list(grader.decisions([("x/2", "2x/4")]))
        for name, pairs in mixes.items():
            pairs = pairs[:number]
            start, cpu = time.monotonic(), _cpu_s(grader)
            cleaned = ((clean_answer(gold), extract_answer(a, None)) for gold, a in pairs)
            rules = Counter(decision.rule for decision in grader.decisions(cleaned))
            wall_s, cpu_s = time.monotonic() - start, _cpu_s(grader) - cpu
            rows.append(
                {
                    "what": name,
                    "answers": len(pairs),
                    "answers_per_s": len(pairs) / wall_s,
                    "answers_per_cpu_s": len(pairs) / cpu_s,
                    "math_verify_frac": rules["math_verify"] / len(pairs),
                    "correct": "",
                    "timeouts": "",
                    "longest_s": "",
                    "peak_worker_mib": "",
                }
            )
    return rows


def _mix(golds: list[str]) -> Iterator[tuple[str, str]]:
    """Four answers a problem: the gold one, another way of it, a near miss, the next problem's."""
    found = labels(golds)
    for i, gold in enumerate(golds):
        yield gold, gold
        for is_equal in (True, False):
            own = [label for label in found if label.gold == gold and label.is_equal == is_equal]
            if own:
                yield gold, own[(7 * i) % len(own)].answer
        yield gold, golds[(i + 1) % len(golds)]


def _cpu_s(grader: Grader) -> float:
    """CPU time of this process and the workers so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for worker in grader._workers:
        stat = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(stat[11]) + int(stat[12])) / ticks
    return total


def hostile_row(number: int) -> dict:
    """`number` hostile answers, one at a time, so that the time of each is known."""
    statuses: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    longest_s = 0.0
    start = time.monotonic()
    with Grader(num_workers=1, timeout_s=TIMEOUT_S, memory_mib=MEMORY_MIB) as grader:
        list(grader.decisions([("x/2", "2x/4")]))
        pids = {worker.process.pid for worker in grader._workers}
        for each in hostile_answers(number):
            asked = time.monotonic()
            pair = clean_answer(each.gold), extract_answer(each.response, "boxed")
            (decision,) = grader.decisions([pair])
            seconds = time.monotonic() - asked
            if decision.status not in ("timeout", "error"):  # after one a worker starts anew
                longest_s = max(longest_s, seconds)
            statuses[decision.status] += 1
            rules[decision.rule] += 1
            pids |= {worker.process.pid for worker in grader._workers}
    wall_s = time.monotonic() - start
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    if left:
        raise RuntimeError(f"processes left behind: {left}")
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "what": f"hostile, one worker, {TIMEOUT_S:g} s each; {dict(statuses)}",
        "answers": number,
        "answers_per_s": number / wall_s,
        "answers_per_cpu_s": "",
        "math_verify_frac": rules["math_verify"] / number,
        "correct": statuses["correct"],
        "timeouts": statuses["timeout"],
        "longest_s": longest_s,
        "peak_worker_mib": peak_mib,
    }


def accuracy_rows(found: list[Label]) -> list[dict]:
    """Shares of wrong gradings, a row for each kind of rewrite and near miss."""
    ours = grade([each.answer for each in found], [each.gold for each in found], timeout_s=10.0)
    correct = {"ours": [verdict.status == "correct" for verdict in ours]}
    for name in RIVALS:
        correct[name] = [status == "correct" for status in statuses_of(name, found)]
    kinds = sorted({(not each.is_equal, each.kind) for each in found})
    groups = [(("rewrite", "near miss")[miss], kind, miss) for miss, kind in kinds]
    groups += [("rewrite", "all", False), ("near miss", "all", True)]
    rows = []
    for label, kind, miss in groups:
        picks = [
            i
            for i, each in enumerate(found)
            if each.is_equal != miss and kind in (each.kind, "all")
        ]
        row = {"label": label, "kind": kind, "answers": len(picks)}
        for name, graded in correct.items():
            row[f"{name}_wrong"] = sum(graded[i] == miss for i in picks)
            row[f"{name}_wrong_frac"] = row[f"{name}_wrong"] / len(picks)
        rows.append(row)
    return rows


def _evenly(found: list[Label], number: int) -> list[Label]:
    """At most `number` of each kind, evenly spaced."""
    kinds: dict[tuple[bool, str], list[Label]] = {}
    for each in found:
        kinds.setdefault((each.is_equal, each.kind), []).append(each)
    return [each for own in kinds.values() for each in own[:: -(-len(own) // number)]]


def next_gold_pairs(golds: list[str]) -> list[tuple[str, str]]:
    """Pairs of a gold answer and the next problem's that are graded as equal."""
    following = golds[1:] + golds[:1]
    pairs = zip(golds, following, grade(following, golds), strict=True)
    return [(gold, other) for gold, other, verdict in pairs if verdict.status == "correct"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("golds", type=Path, help="parquet file with a column answer")
    parser.add_argument("--out-folder", type=Path)
    parser.add_argument("--only", nargs="+", default=["speed", "hostile", "accuracy"])
    parser.add_argument("--answers", type=int, default=2000, help="of each mix")
    parser.add_argument("--hostile", type=int, default=10_000)
    parser.add_argument("--per-kind", type=int, help="labels of each kind at most; None: all")
    options = parser.parse_args()
    out = options.out_folder
    golds = read_golds(options.golds)
    if "accuracy" in options.only:
        found = labels(golds)
        if options.per_kind:
            found = _evenly(found, options.per_kind)
        rows = [row | machine() for row in accuracy_rows(found)]
        write_rows(rows, out and out / "grader_accuracy.csv")
        print("equal to the next problem's gold answer:", next_gold_pairs(golds))
    rows = speed_rows(golds, options.answers) if "speed" in options.only else []
    rows += [hostile_row(options.hostile)] if "hostile" in options.only else []
    if rows:
        write_rows([row | machine() for row in rows], out and out / "grader.csv")


if __name__ == "__main__":
    main()
