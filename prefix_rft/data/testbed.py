"""Synthetic multi-step arithmetic with worked demonstrations: the dataset `testbed`. Pure.

A problem is a start value and a chain of additions and subtractions; its difficulty is the number
of steps and the size of the operands. The lessons produce a base that can show its work but rarely
does: it is taught to show the steps when the prompt asks for them. Unasked, it works through easy
problems step by step and guesses the answer of nearly all longer ones. Training has to discover
that working pays off unasked as well; every demonstration does it.
"""

import random
import string
from collections.abc import Collection

from prefix_rft.checks import ConfigError
from prefix_rft.config import TestbedConfig

TestbedRow = dict[str, str | int]

_ASKED = " Show the steps."
_ATTEMPTS = 100  # draws per row before we conclude that there are too few different problems


def make_row(rng: random.Random, *, num_steps: int, max_operand: int, max_value: int) -> TestbedRow:
    """One problem: {"prompt", "answer", "demonstration", "num_steps"}.

    Operands are in [1, max_operand], the start value and all results in [0, max_value].
    """
    start = value = rng.randint(0, max_value)
    steps, results = [], []
    for label in string.ascii_lowercase[:num_steps]:
        operand = rng.randint(1, max_operand)
        outcomes = {"+": value + operand, "-": value - operand}
        sign = rng.choice([s for s, result in outcomes.items() if 0 <= result <= max_value])
        value = outcomes[sign]
        steps.append(f"{label} {sign}{operand}")
        results.append(value)
    lines = [f"{step} ={result}" for step, result in zip(steps, results, strict=True)]
    return {
        "prompt": "\n".join([f"Start with {start}.", *steps, "What is the result?"]),
        "answer": str(value),
        "demonstration": "\n".join([*lines, _boxed(value)]),
        "num_steps": num_steps,
    }


def make_rows(
    config: TestbedConfig, num_eval: int, seed: int
) -> tuple[list[TestbedRow], list[TestbedRow]]:
    """`config.num_train` training rows and `num_eval` held-out rows, all with different prompts.

    The number of steps is drawn uniformly from [min_steps, max_steps].

    Raises:
        ConfigError: there are too few problems of this difficulty.
    """
    rng = random.Random(f"testbed rows {seed}")
    wanted = config.num_train + num_eval
    rows: dict[str | int, TestbedRow] = {}
    for _ in range(_ATTEMPTS * wanted):
        row = _draw(rng, config, config.min_steps)
        rows.setdefault(row["prompt"], row)
        if len(rows) == wanted:
            distinct = list(rows.values())
            return distinct[num_eval:], distinct[:num_eval]
    raise ConfigError(
        f"testbed.num_train: expected at most {len(rows)} different problems of this difficulty, "
        f"including data.num_eval, got {config.num_train} + {num_eval}"
    )


def make_lessons(
    config: TestbedConfig, num_lessons: int, seed: int, exclude: Collection[str] = ()
) -> list[tuple[str, str]]:
    """What the base learns from: (prompt, completion) of problems with 1 to max_steps steps.

    Args:
        exclude: prompts, such as the held-out ones, whose problems no lesson uses.
    """
    rng = random.Random(f"testbed lessons {seed}")
    excluded = frozenset(exclude)
    lessons: list[tuple[str, str]] = []
    while len(lessons) < num_lessons:
        row = _draw(rng, config, 1)
        if row["prompt"] not in excluded:
            lessons.append(_lesson(rng, config, row))
    return lessons


def _draw(rng: random.Random, config: TestbedConfig, min_steps: int) -> TestbedRow:
    return make_row(
        rng,
        num_steps=rng.randint(min_steps, config.max_steps),
        max_operand=config.max_operand,
        max_value=config.max_value,
    )


def _lesson(rng: random.Random, config: TestbedConfig, row: TestbedRow) -> tuple[str, str]:
    if rng.random() < config.asked_fraction:
        return row["prompt"] + _ASKED, row["demonstration"]
    is_easy = row["num_steps"] <= config.easy_steps
    is_worked = rng.random() < (
        config.easy_worked_fraction if is_easy else config.hard_worked_fraction
    )
    return row["prompt"], row["demonstration"] if is_worked else _boxed(row["answer"])


def _boxed(answer: int | str) -> str:
    return f"\\boxed{{{answer}}}"
