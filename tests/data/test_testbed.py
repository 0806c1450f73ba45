"""The synthetic problems: correct, seeded, disjoint, and of the requested difficulty."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config.data_sections import TestbedConfig
from prefix_rft.data.testbed import make_lessons, make_row, make_rows

CONFIG = TestbedConfig(num_train=300, min_steps=2, max_steps=6)
SCARCE = TestbedConfig(num_train=60, min_steps=1, max_steps=2, max_operand=3, max_value=6)
ASKED = " Show the steps."


def solve(prompt):
    """(answer, worked lines) of a problem, computed from its prompt."""
    start, *steps, question = prompt.split("\n")
    assert question.startswith("What is the result?")
    value = int(re.fullmatch(r"Start with (\d+)\.", start)[1])
    lines = []
    for step in steps:
        value += int(step.split(" ")[1])
        lines.append(f"{step} ={value}")
    return value, lines


def numbers(row):
    return [int(n) for n in re.findall(r"\d+", row["prompt"] + row["demonstration"])]


def test_a_worked_example():
    row = make_row(random.Random(7), num_steps=3, max_operand=9, max_value=20)
    assert set(row) == {"prompt", "answer", "demonstration", "num_steps"}
    value, lines = solve(row["prompt"])
    assert row["demonstration"] == "\n".join([*lines, f"\\boxed{{{value}}}"])


def test_every_demonstration_holds_when_it_is_worked_out_again():
    train, held_out = make_rows(CONFIG, 100, seed=3)
    for row in train + held_out:
        value, lines = solve(row["prompt"])
        assert row["answer"] == str(value)
        *worked, last = row["demonstration"].split("\n")
        assert worked == lines and last == f"\\boxed{{{value}}}"
        assert len(worked) == row["num_steps"]


def test_rows_follow_the_seed():
    assert make_rows(CONFIG, 50, seed=1) == make_rows(CONFIG, 50, seed=1)
    assert make_rows(CONFIG, 50, seed=1)[0] != make_rows(CONFIG, 50, seed=2)[0]
    assert make_lessons(CONFIG, 50, seed=1) == make_lessons(CONFIG, 50, seed=1)
    assert make_lessons(CONFIG, 50, seed=1) != make_lessons(CONFIG, 50, seed=2)


def test_no_prompt_occurs_twice_even_where_problems_are_scarce():
    train, held_out = make_rows(replace(SCARCE, num_train=60), 40, seed=0)
    prompts = [row["prompt"] for row in train + held_out]
    assert (len(train), len(held_out), len(set(prompts))) == (60, 40, 100)


def test_too_few_problems_are_refused():
    message = r"testbed.num_train: expected at most \d+ different problems .* got 900 \+ 100"
    with pytest.raises(ConfigError, match=message):
        make_rows(replace(SCARCE, num_train=900), 100, seed=0)


def test_the_knobs_bound_steps_operands_and_values():
    config = TestbedConfig(num_train=500, min_steps=3, max_steps=5, max_operand=4, max_value=8)
    rows, _ = make_rows(config, 1, seed=0)
    assert {row["num_steps"] for row in rows} == {3, 4, 5}
    operands = {int(n) for row in rows for n in re.findall(r"[+-](\d+)", row["prompt"])}
    assert operands == {1, 2, 3, 4}
    assert {n for row in rows for n in numbers(row)} == set(range(9))


def test_lessons_leave_out_the_excluded():
    train, held_out = make_rows(replace(SCARCE, num_train=40), 40, seed=0)
    excluded = [row["prompt"] for row in held_out]
    about = {
        prompt.removesuffix(ASKED)
        for prompt, _ in make_lessons(SCARCE, 2000, seed=0, exclude=excluded)
    }
    assert not about & set(excluded)
    assert about & {row["prompt"] for row in train}


def test_lessons_work_when_asked_or_easy_and_else_guess():
    config = TestbedConfig(
        max_steps=6,
        asked_fraction=0.5,
        easy_steps=2,
        easy_worked_fraction=0.75,
        hard_worked_fraction=0.125,
    )
    worked, lessons = Counter(), Counter()
    for prompt, completion in make_lessons(config, 6000, seed=0):
        value, lines = solve(prompt)
        kind = "asked" if prompt.endswith(ASKED) else "easy" if len(lines) <= 2 else "hard"
        guess = f"\\boxed{{{value}}}"
        assert completion in (guess, "\n".join([*lines, guess]))
        lessons[kind] += 1
        worked[kind] += completion != guess
    assert lessons["asked"] / 6000 == pytest.approx(0.5, abs=0.03)
    fractions = {kind: worked[kind] / lessons[kind] for kind in lessons}
    assert fractions["asked"] == 1
    assert fractions["easy"] == pytest.approx(0.75, abs=0.05)
    assert fractions["hard"] == pytest.approx(0.125, abs=0.03)
