"""The grader on its own: from Python, and from a file of JSON lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefix_rft.cli import main
from prefix_rft.reward import Verdict, grade
from prefix_rft.reward.grader import AHEAD, Grader
from tests.reward.golds import needs_golds, read_golds
from tests.reward.hostile import hostile_answers


def test_verdicts_name_the_status_the_answer_and_the_rule() -> None:
    answers = ["5.0", "6", "0.5x", "9^{9^{9}}", "x" * 5000, "5 cm", "1, 2"]
    golds = ["5", "5", r"\frac{x}{2}", "5", "5", "5 m", "2,1"]
    expected = [
        ("correct", "number"),
        ("wrong", "number"),
        ("correct", "math_verify"),
        ("wrong", "refused"),
        ("wrong", "too_long"),
        ("wrong", "unit"),
        ("correct", "elements"),
    ]
    found = grade(answers, golds, num_workers=1, timeout_s=20.0)
    assert [(verdict.status, verdict.rule) for verdict in found] == expected
    assert [verdict.extracted for verdict in found] == answers


def test_whole_responses_are_searched_by_the_pattern() -> None:
    responses = [r"\boxed{4} no: \boxed{$5$}", "5"]
    assert grade(responses, ["5", "5"], answer_pattern="boxed", num_workers=1) == [
        Verdict(status="correct", extracted="5", rule="same_text"),
        Verdict(status="no_answer", extracted=None, rule="no_answer"),
    ]
    with pytest.raises(ValueError, match="expected one for each of 2 answers, got 1"):
        grade(responses, ["5"])


def test_any_number_of_answers_is_read_as_needed() -> None:
    num_read = 0

    def pairs():
        nonlocal num_read
        for i in range(10**9):
            num_read += 1
            yield str(i), str(i)

    with Grader(num_workers=1, timeout_s=1.0, memory_mib=512) as grader:
        decisions = grader.decisions(pairs())
        for _ in range(5 * AHEAD):
            assert next(decisions).status == "correct"
        assert num_read <= 6 * AHEAD
        decisions.close()


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_file_is_graded_in_order(tmp_path, capsys) -> None:
    rows = [
        {"answer": "5", "response": "#### 5\nmore"},
        {"answer": "5", "response": "none"},
        {"answer": "x/2", "response": "#### 0.5x"},
        {"answer": "5", "response": "#### \ud800"},
        {"answer": "5", "response": "#### 6"},
    ]
    path = write_lines(tmp_path / "in.jsonl", *map(json.dumps, rows), "")
    options = ["--answer-pattern", "####", "--timeout-s", "20"]
    assert main(["grade", str(path), *options]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["status"] for row in found] == ["correct", "no_answer", "correct", "wrong", "wrong"]
    assert [row["extracted"] for row in found] == ["5", None, "0.5x", "\ud800", "6"]
    assert found[0] == {"status": "correct", "extracted": "5", "rule": "same_text"}
    assert "5 answers" in err and "40.0% correct" in err and "2 math_verify" in err


GOOD = '{"answer": "5", "response": "5"}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, "{"], "line 2: expected a JSON object, got b'{"),
        ([GOOD, GOOD, "[5]"], "line 3: expected a JSON object, got b'[5]"),
        (['{"answer": "5"}'], "line 1: expected a text under 'response', got only answer"),
        (["{}"], "line 1: expected a text under 'answer', got only no keys"),
        ([GOOD, '{"answer": 5, "response": "5"}'], "line 2: expected a text under 'answer', got 5"),
    ],
)
def test_a_bad_line_is_told_before_any_work(tmp_path, capsys, lines, expected) -> None:
    assert main(["grade", str(write_lines(tmp_path / "in.jsonl", *lines))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "no such file"),
        (["--num-workers", "0"], "--num-workers: expected above 0, got 0"),
        (["--timeout-s", "nan"], "--timeout-s: expected above 0, got nan"),
        (["--answer-pattern", ""], "--answer-pattern: expected boxed or a marker"),
    ],
)
def test_bad_options_are_one_error(tmp_path, capsys, options, expected) -> None:
    assert main(["grade", str(tmp_path / "none.jsonl"), *options]) == 2
    assert expected in capsys.readouterr().err


def test_the_grader_comes_without_the_trainer() -> None:
    heavy = '{"torch", "transformers", "math_verify", "sympy", "pyarrow"}'
    script = f"import sys, prefix_rft.reward as r; r.grade; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_hostile_answers_are_wrong_and_leave_nothing_behind() -> None:
    with Grader(num_workers=2, timeout_s=1.0, memory_mib=512) as grader:
        found = list(hostile_answers(60))
        pairs = [(each.gold, each.response) for each in found]
        from prefix_rft.reward.verdicts import verdicts

        graded = list(verdicts(grader, [(r, g) for g, r in pairs], answer_pattern="boxed"))
        running = [worker.process for worker in grader._workers]
    correct = [each for each, v in zip(found, graded, strict=True) if v.status == "correct"]
    assert len(graded) == 60 and correct == []
    assert all(process.poll() is not None for process in running)


@needs_golds
@pytest.mark.slow
def test_every_gold_answer_is_right_and_the_next_one_is_not() -> None:
    golds = read_golds()
    assert {verdict.status for verdict in grade(golds, golds)} == {"correct"}
    following = golds[1:] + golds[:1]
    found = grade(following, golds, timeout_s=20.0)
    same = [
        p
        for p, v in zip(zip(golds, following, strict=True), found, strict=True)
        if v.status == "correct"
    ]
    assert all(gold.removesuffix(".0") == other.removesuffix(".0") for gold, other in same)
