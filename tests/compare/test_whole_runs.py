"""Comparisons of real runs of a tiny model, whole and stopped in the middle."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefix_rft.config import save_config
from tests.tiny import make_run

pytestmark = pytest.mark.slow

FILE = """
config = "tiny.toml"
seeds = [0, 1]
[cells.sft]
method.name = "sft"
trainer.num_steps = 4
[cells.prefix_rft]
[cells.chain]
start = "sft"
method.name = "rft"
seeds = [1]
"""
NUM_RUNS = 5
TIMED = ("seconds", "start_seconds", "commit")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    config = make_run(
        folder,
        trainer={"num_steps": 40, "checkpoint_every": 3},
        eval={"num_samples": 2, "every": 20},
    )
    save_config(config, folder / "tiny.toml")
    (folder / "mine.toml").write_text(FILE)
    return folder / "mine.toml"


def start(file: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "prefix_rft", "compare", str(file), "--output-dir", str(out)]
    # One thread: sums then have one order.
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--jobs", "2"],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "comparison.csv").open() as stream:
        found = list(csv.DictReader(stream))
    return [{name: x for name, x in row.items() if name not in TIMED} for row in found]


@pytest.fixture(scope="module")
def whole(file: Path) -> Path:
    """The folder of a comparison that nothing has stopped."""
    out = file.parent / "whole"
    process = start(file, out)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    assert f"{NUM_RUNS}/{NUM_RUNS}" in output
    return out


def test_cells_differ_in_what_they_override_and_a_chain_begins_where_its_start_ends(whole) -> None:
    found = {(row["cell"], row["seed"]): row for row in rows(whole)}
    assert list(found) == [
        *(("sft", "0"), ("sft", "1"), ("prefix_rft", "0"), ("prefix_rft", "1"), ("chain", "1")),
    ]
    assert len({row["base_greedy"] for key, row in found.items() if key[0] != "chain"}) == 1
    sft, chain = found["sft", "1"], found["chain", "1"]
    assert (sft["steps"], chain["steps"]) == ("4", "40")
    assert (sft["rollout_tokens"], chain["start_rollout_tokens"]) == ("0", "0")
    assert chain["start_trained_tokens"] == sft["trained_tokens"] != "0"
    assert found["prefix_rft", "0"]["entropy"] != found["prefix_rft", "1"]["entropy"]
    # The model that SFT has made is the one that the chain measures first.
    names = ("greedy", "avg@2", "response_length_mean")
    assert [chain[f"base_{name}"] for name in names] == [sft[name] for name in names]


def test_a_run_leaves_what_came_of_each_problem(whole) -> None:
    summary = json.loads((whole / "prefix_rft-0/summary.json").read_text())["trained"]
    lines = (whole / "prefix_rft-0/evaluation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == len({each["index"] for each in records}) == summary["num_problems"]
    assert sum(each["greedy"] for each in records) / len(records) == summary["greedy"]
    shares = [each["num_correct"] / each["num_samples"] for each in records]
    assert sum(shares) / len(shares) == summary["avg@2"]
    lengths = [length for each in records for length in each["lengths"]]
    assert sum(lengths) / len(lengths) == pytest.approx(summary["response_length_mean"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_and_begun_again_it_ends_the_same(file, whole, number: int) -> None:
    out = file.parent / f"stopped-{number}"
    process = start(file, out)
    metrics = out / "prefix_rft-0/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count('"kind": "train"') >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -number), output
    if number == signal.SIGINT:
        steps = [path.name for path in (out / "prefix_rft-0/checkpoints").iterdir()]
        assert any(5 <= int(name.removeprefix("step-")) < 40 for name in steps)

    again = start(file, out)  # at once: a run may still be saving
    output, _ = again.communicate(timeout=1200)
    assert again.returncode == 0, output
    assert "resuming from" in (out / "prefix_rft-0/log.txt").read_text()
    assert rows(out) == rows(whole)
