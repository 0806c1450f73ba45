"""Tables and curves of rows and records that are given."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_rft.compare.comparison import Comparison, Run, load_comparison
from prefix_rft.compare.curves import curve, points
from prefix_rft.compare.results import write_csv
from prefix_rft.compare.table import budget_statement, make_tables, markdown

FILE = """
config = "testbed"
seeds = [0, 1]
[common]
data.seed = 0
[cells.rft]
method.name = "rft"
[cells.sft]
method.name = "sft"
seeds = [0]
[cells.chain]
start = "sft"
seeds = [0]
"""


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    (tmp_path / "mine.toml").write_text(FILE)
    return load_comparison(str(tmp_path / "mine.toml"), tmp_path / "out")


def budget(updates: int, rollout_tokens: int, start: str = "") -> list[dict]:
    return [{"updates": updates, "rollout_tokens": rollout_tokens, "start": start}]


def test_equal_budgets_are_stated_and_unequal_ones_named() -> None:
    equal = {"a": budget(60, 500), "b": budget(60, 500)}
    assert budget_statement(equal) == (
        "Updates: equal, 60 a run. Rollout tokens: equal, 500 a run."
    )
    unequal = {"a": budget(60, 1000), "b": budget(60, 500), "sft": budget(30, 0)}
    unequal["chain"] = budget(60, 500, start="sft")
    assert budget_statement(unequal) == (
        "Updates: not equal, from 30 (sft) to 60 (a), a factor of 2.00. Rollout tokens: not equal, "
        "from 500 (b) to 1,000 (a), a factor of 2.00; none in sft. The stages that chain start "
        "from come on top: the columns start."
    )


def row(cell: str, seed: int, accuracy: float, start: str = "") -> dict:
    return {
        "cell": cell,
        "seed": seed,
        "start": start,
        **dict.fromkeys(("steps", "rollout_tokens", "trained_tokens", "updates", "seconds"), 1),
        **{
            f"start_{name}": 2 if start else 0
            for name in ("rollout_tokens", "trained_tokens", "updates", "seconds")
        },
        "entropy": None if cell == "sft" else 0.25,
        "greedy": accuracy,
        "greedy_ci95_low": 0.0,
        "avg@2": accuracy,
        "avg@2/hard": accuracy / 2,
        "response_length_mean": 10.0,
        **dict.fromkeys(("base_greedy", "base_greedy_ci95_low", "base_avg@2"), 0.1),
        **dict.fromkeys(("base_avg@2/hard", "base_response_length_mean"), 0.1),
    }


def leave(run: Run, correct: list[int]) -> None:
    """The files of a finished run that was right `correct[i]` of 2 times on problem i."""
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text('{"trained": {}, "model_step": 1}')
    lines = [
        {"index": i, "group": "hard", "greedy": bool(n), "num_samples": 2, "num_correct": n}
        for i, n in enumerate(correct)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "evaluation.jsonl").write_text(text)


def test_tables_have_means_intervals_and_paired_differences(comparison: Comparison) -> None:
    runs = comparison.runs()
    correct = {"rft-0": [2, 0], "rft-1": [2, 2], "sft-0": [2, 1], "chain-0": [0, 0]}
    for run in runs:
        leave(run, correct[run.name])
    rows = [row("rft", 0, 0.4), row("rft", 1, 0.6), row("sft", 0, 0.5), row("chain", 0, 0, "sft")]
    results, grouped, budgets, differences = make_tables(comparison, runs, rows)
    assert results.columns == ("cell", "seeds", "greedy", "avg@2", "response length", "entropy")
    # mean 0.5, standard deviation 0.1414, t of 1 degree 12.706: half width 1.2706
    assert results.rows[:3] == [
        ("base", "2", *["10.0 (10.0 to 10.0)"] * 2, "0.1 (0.1 to 0.1)", ""),
        (
            *("rft", "2", *["50.0 (−77.1 to 177.1)"] * 2),
            *("10.0 (10.0 to 10.0)", "0.250 (0.250 to 0.250)"),
        ),
        ("sft", "1", "50.0", "50.0", "10.0", ""),
    ]
    assert grouped.rows[1] == ("rft", "2", "25.0 (−38.5 to 88.5)")
    assert budgets.rows[0][5:] == ("1", "", "", "", "")
    assert budgets.rows[2][5:] == ("1", "2", "2", "2", "2")
    assert differences.columns == ("cell", "seeds", "problems", "greedy", "avg@2", "avg@2/hard")
    # Of seed 0, which both have: avg@2 of sft is 0 and 1/2 above that of rft, greedy 0 and 1.
    assert differences.rows == [
        ("sft", "1", "2", "+50.0 (+0.0 to +100.0)", *["+25.0 (+0.0 to +50.0)"] * 2),
        ("chain", "1", "2", *["−50.0 (−100.0 to +0.0)"] * 3),
    ]
    text = markdown([results, differences])
    assert "| sft | 1 | 50.0 | 50.0 | 10.0 |  |\n" in text and "## Difference to rft" in text


def test_seeds_that_the_reference_lacks_are_left_out(comparison: Comparison) -> None:
    comparison = replace(comparison, reference="sft")
    runs = comparison.runs()
    for run in runs:
        leave(run, [2, 2] if run.name == "rft-1" else [0, 1])
    rows = [row("rft", 0, 0.4), row("rft", 1, 0.4), row("sft", 0, 0.5)]
    differences = make_tables(comparison, runs, rows)[-1]
    assert differences.rows[0][:2] == ("rft", "1")
    assert differences.rows[0][4] == "+0.0 (+0.0 to +0.0)"


def test_an_interval_without_0_is_marked_and_runs_without_outcomes_are_left_out(
    comparison: Comparison,
) -> None:
    runs = comparison.runs()
    correct = {"rft-0": [0, 0], "rft-1": [0, 0], "sft-0": [2, 1], "chain-0": [0, 0]}
    for run in runs:
        leave(run, correct[run.name])
    (comparison.folder / "chain-0/evaluation.jsonl").unlink()
    rows = [row("rft", 0, 0.4), row("sft", 0, 0.5)]
    differences = make_tables(comparison, runs, rows)[-1]
    assert [each[:3] for each in differences.rows] == [("sft", "1", "2")]
    assert differences.rows[0][4] == "+75.0 (+50.0 to +100.0) *"


def test_the_csv_has_every_column_and_the_code_last(tmp_path: Path) -> None:
    rows = [{"cell": "a", "x": 1, "commit": "c"}, {"cell": "b", "y": None, "commit": "d"}]
    write_csv(rows, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == "cell,x,y,commit\na,1,,c\nb,,,d\n"


def test_a_curve_of_a_chain_begins_where_its_start_ended(comparison: Comparison) -> None:
    runs = {run.name: run for run in comparison.runs()}

    def record(run: Run, *evaluations: int) -> None:
        run.folder.mkdir(parents=True)
        records = [{"step": s, "kind": "eval", "eval/avg@2": s / 10} for s in evaluations]
        for step in range(max(evaluations)):
            spent = {"rollout/generated_tokens_sum": 100, "policy/loss_tokens_sum": 10}
            records.append({"step": step, "kind": "train", "time/step_s": 2.0, **spent})
        text = "".join(json.dumps(line) + "\n" for line in records)
        (run.folder / "metrics.jsonl").write_text(text)

    record(runs["sft-0"], 0, 2)
    record(runs["chain-0"], 0, 1, 3)
    found = points(runs["chain-0"])
    assert [(p.steps, p.tokens, p.seconds) for p in found] == [
        *((2, 220, 4.0), (3, 330, 6.0), (5, 550, 10.0)),
    ]
    other = [replace(p, tokens=p.tokens + 20, figures={"avg@2": 0.5}) for p in found[1:]]
    assert curve([found, other], "tokens", "avg@2") == [
        pytest.approx((340, 0.3, 0.1, 0.5)),
        pytest.approx((560, 0.4, 0.3, 0.5)),
    ]
