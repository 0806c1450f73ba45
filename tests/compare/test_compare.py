"""The whole command, with stand_in.py in the place of the runs."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefix_rft import cli
from prefix_rft.checks import ConfigError
from prefix_rft.compare import compare
from prefix_rft.train import RunLock

LAUNCHER = shlex.join([sys.executable, str(Path(__file__).with_name("stand_in.py"))])
FILE = """
config = "testbed"
seeds = [0, 1]
reference = "rft"
[common]
model.path = "nowhere"
data.seed = 0
[cells.sft]
method.name = "sft"
[cells.rft]
method.name = "rft"
[cells.chain]
start = "sft"
method.name = "prefix_rft"
"""
ALL = ["sft-0", "rft-0", "chain-0", "sft-1", "rft-1", "chain-1"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    return path


def run(file: Path, **options: object) -> int:
    return compare(str(file), launcher=LAUNCHER, output_dir=file.parent / "out", **options)


def started(file: Path) -> list[str]:
    """Names of the runs that were started, in order."""
    text = (file.parent / "out/order.txt").read_text()
    return [line.split()[0] for line in text.splitlines()]


def rows(file: Path) -> list[dict[str, str]]:
    with (file.parent / "out/comparison.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_all_runs_are_done_in_order_and_leave_a_row_each(file, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run(file) == 0
    assert started(file) == ALL
    assert {line.split()[1] for line in (file.parent / "out/order.txt").open()} == {"None"}
    found = rows(file)
    assert [(row["cell"], row["seed"]) for row in found] == [
        (cell, seed) for cell in ("sft", "rft", "chain") for seed in "01"
    ]
    expected = {
        "method": "rft",
        "start": "",
        "steps": "3",
        "rollout_tokens": "303",
        "trained_tokens": "30",
        "updates": "6",
        "seconds": "4.5",
        "start_updates": "0",
        "entropy": "0.4",  # the last step has none
        "greedy": "0.01",
        "greedy_ci95_high": "0.11",
        "avg@2/hard": "0.005",
        "answers_correct": "5",
        "base_avg@2": "0.1",
    }
    assert {name: found[3][name] for name in expected} == expected
    chain = found[5]
    assert (chain["start"], chain["start_rollout_tokens"], chain["start_seconds"]) == (
        *("sft", "303", "4.5"),
    )
    assert "grader" not in found[0]
    for name in ("comparison.md", "comparison.html"):
        assert "Difference to rft" in (file.parent / "out" / name).read_text()


def test_what_is_done_is_skipped_and_only_names_cells_with_their_starts(file) -> None:
    assert run(file, only=("chain",)) == 0
    assert started(file) == ["sft-0", "chain-0", "sft-1", "chain-1"]
    assert run(file) == 0
    assert started(file)[4:] == ["rft-0", "rft-1"]
    assert run(file) == 0
    assert len(started(file)) == 6


def test_the_base_is_made_once_before_the_runs(file, monkeypatch) -> None:
    out, bases = file.parent / "out", []

    def resolve_base(config) -> str:
        assert not list(out.glob("*-0"))
        bases.append(config.model.path)
        return "base"

    monkeypatch.setattr("prefix_rft.compare.command.resolve_base", resolve_base)
    file.write_text(FILE.replace('[cells.sft]\nmethod.name = "sft"\n', "") + "[cells.sft]\n")
    assert run(file, only=("chain",)) == 0
    assert bases == ["nowhere"]  # not the model that the first cell starts from
    assert run(file, only=("chain",)) == 0
    assert len(bases) == 1


def test_tables_only_runs_nothing_and_leaves_the_same_files(file, capsys) -> None:
    assert run(file, tables_only=True) == 0
    assert "no run is done yet" in capsys.readouterr().out
    assert not (file.parent / "out").exists()
    run(file)
    names = ("comparison.csv", "comparison.md", "comparison.html")
    before = [(file.parent / "out" / name).read_text() for name in names]
    for name in names:
        (file.parent / "out" / name).unlink()
    assert run(file, tables_only=True) == 0
    assert [(file.parent / "out" / name).read_text() for name in names] == before
    assert len(started(file)) == 6


@pytest.mark.parametrize(("function", "why"), [("fail", "status 1"), ("stop", "ended before")])
def test_a_failing_cell_stops_only_those_behind_it(file, capsys, function: str, why: str) -> None:
    file.write_text(FILE.replace('name = "sft"', f'name = "sft"\nreward.function = "{function}"'))
    assert run(file) == 1
    assert started(file) == ["sft-0", "rft-0", "sft-1", "rft-1"]
    assert [row["cell"] for row in rows(file)] == ["rft", "rft"]
    errors = capsys.readouterr().err
    assert re.search(
        rf"^error: sft-0: .*{why}.*, see .*out/sft-0/log.txt:\n    line 1\d$", errors, re.MULTILINE
    )
    assert "error: chain-1: not begun, since sft-1 failed" in errors
    file.write_text(FILE)  # put right, it goes on
    assert run(file) == 0
    assert len(rows(file)) == 6


def test_jobs_run_at_once_and_share_the_cpus(file, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("prefix_rft.compare.jobs._num_cpus", lambda: 7)
    file.write_text(FILE.replace("[cells.rft]", '[cells.rft]\nreward.function = "wait"'))
    out = file.parent / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt_when(out / "rft-0/waits", lambda: run(file, jobs=2))
    lines = dict(line.split() for line in (out / "order.txt").open())
    assert lines["sft-0"] == lines["rft-0"] == "3"


def interrupt_when(path: Path, action) -> None:
    """Run `action`; this process gets SIGINT once `path` is there."""
    code = (
        "import os, pathlib, signal, sys, time\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)\n"
        "os.kill(int(sys.argv[2]), signal.SIGINT)\n"
    )
    helper = subprocess.Popen([sys.executable, "-c", code, str(path), str(os.getpid())])
    try:
        action()
    finally:
        helper.kill()
        helper.wait()


def test_an_interrupt_stops_the_children_and_a_rerun_goes_on(file) -> None:
    file.write_text(FILE.replace("[cells.rft]", '[cells.rft]\nreward.function = "wait"'))
    out = file.parent / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt_when(out / "rft-0/waits", lambda: run(file))
    assert started(file) == ["sft-0", "rft-0"]
    assert len(rows(file)) == 1
    file.write_text(FILE)
    assert run(file) == 0
    assert started(file) == ["sft-0", "rft-0", *ALL[1:]]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_comparison_with_the_folder_is_refused(file, monkeypatch, capsys) -> None:
    monkeypatch.setattr("prefix_rft.train.lock.HEARTBEAT_S", 0.1)
    monkeypatch.setattr("prefix_rft.train.lock.SILENCE_S", 2.0)
    lock = RunLock(file.parent / "out")
    lock.acquire()
    try:
        command = ["compare", str(file), "--output-dir", str(file.parent / "out")]
        assert cli.main([*command, "--launcher", LAUNCHER]) == 2
    finally:
        lock.release()
    assert f"out is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert run(file) == 0


def test_steps_of_another_configuration_are_refused(file) -> None:
    run(file)
    file.write_text(FILE.replace('name = "rft"', 'name = "rft"\noptimizer.lr = 0.5'))
    with pytest.raises(ConfigError, match=r"cells.rft.optimizer.lr: expected 0.0001, with which"):
        run(file)
    file.write_text(FILE.replace('"sft"\nmethod.name = "pre', '"rft"\nmethod.name = "pre'))
    with pytest.raises(ConfigError, match=r"cells.chain.model.path: expected 'sft-0', .*'rft-0'"):
        run(file)
    file.write_text(FILE.replace("data.seed = 0", "data.seed = 0\nlog.tensorboard = false"))
    assert run(file) == 0


def test_the_command_passes_its_options_on(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        "prefix_rft.compare.compare", lambda *args, **options: calls.append((args, options)) or 1
    )
    command = "compare mine.toml --jobs 3 --only a,b --tables-only --output-dir x"
    assert cli.main([*command.split(), "--launcher", "torchrun --nproc-per-node 8"]) == 1
    options = {"jobs": 3, "only": ("a", "b"), "tables_only": True, "output_dir": Path("x")}
    assert calls == [(("mine.toml",), options | {"launcher": "torchrun --nproc-per-node 8"})]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"jobs": 0}, "--jobs: expected a whole number above 0, got 0"), ({"only": ("x",)}, "--only")],
)
def test_options_that_cannot_be_are_refused(file, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(file, **options)
    assert not (file.parent / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children outlive a killed parent elsewhere")
def test_runs_of_a_comparison_that_is_killed_end_too(file) -> None:
    out = file.parent / "out"
    file.write_text(FILE.replace("[cells.sft]", '[cells.sft]\nreward.function = "wait"'))
    command = [sys.executable, "-m", "prefix_rft", "compare", str(file), "--output-dir", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([*command, "--launcher", LAUNCHER], env=environment)
    waits = out / "sft-0/waits"
    while not waits.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(waits.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    file.write_text(FILE)
    assert run(file) == 0
    assert len(rows(file)) == 6


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_versions_of_the_code_are_noted_once(file, monkeypatch) -> None:
    origins = iter([{"version": "1", "commit": "a"}, {"version": "1", "commit": "b"}])
    monkeypatch.setattr("prefix_rft.compare.command.code_origin", lambda: next(origins))
    file.write_text(FILE.replace('name = "sft"', 'name = "sft"\nreward.function = "stop"'))
    run(file)
    file.write_text(FILE)
    run(file)
    assert {row["cell"]: (row["version"], row["commit"]) for row in rows(file)} == {
        "sft": ("1", "a b"),
        "rft": ("1", "a"),
        "chain": ("1", "b"),
    }
    assert len(json.loads((file.parent / "out/sft-0/origin.json").read_text())) == 2
