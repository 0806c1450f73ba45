"""What came of each held-out problem, on disk, for comparisons problem by problem."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from prefix_rft.data_types import Problem
from prefix_rft.evaluate.answers import Answers


def write_outcomes(path: Path, problems: Sequence[Problem], answers: Sequence[Answers]) -> None:
    """One JSON line for each problem, all at once or not at all.

    `index` of the problem's row; `group`, its value of `eval.group_by`; `greedy`, whether that
    answer is correct (null without a reward); `num_samples` with a reward and `num_correct` of
    them; `lengths` of all samples in tokens.
    """
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8") as stream:
        for problem, each in zip(problems, answers, strict=True):
            graded = [score for score in each.scores if score.reward is not None]
            record = {
                "index": problem.index,
                "group": each.group,
                "greedy": None if each.greedy.reward is None else each.greedy.status == "correct",
                "num_samples": len(graded),
                "num_correct": sum(score.status == "correct" for score in graded),
                "lengths": list(each.lengths),
            }
            stream.write(json.dumps(record) + "\n")
    os.replace(partial, path)
