"""One process at a time writes to a run folder; a lock that nobody holds any more does not last."""

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from prefix_rft.metrics import write_report
from prefix_rft.train import lock as lock_module
from prefix_rft.train.lock import LockedError, RunLock
from prefix_rft.train.run import evaluate_model, export_checkpoint, train
from tests.tiny import make_run

SILENCE_S = 2.0


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lock_module, "SILENCE_S", SILENCE_S)
    monkeypatch.setattr(lock_module, "_LOOK_S", 0.05)


def hold(run_dir: Path, ready: Connection) -> None:
    RunLock(run_dir).acquire()
    ready.send(None)
    time.sleep(600)


@contextmanager
def holder(run_dir: Path) -> Iterator[int]:
    """Another process that holds the lock; its id."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(run_dir, theirs))
    process.start()
    assert ours.poll(60)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def acquire(run_dir: Path) -> float:
    """Take the lock and give it back; the seconds that it took."""
    start = time.monotonic()
    lock = RunLock(run_dir)
    lock.acquire()
    lock.release()
    return time.monotonic() - start


def change(run_dir: Path, pattern: str, text: str) -> None:
    """Rewrite a field of the lock in its place."""
    path = run_dir / lock_module.LOCK_FILE
    changed, count = re.subn(pattern, text, path.read_text())
    assert count == 1
    with path.open("r+") as stream:
        stream.write(changed)
        stream.truncate()


def test_the_second_is_refused_and_told_who_is_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as pid:
        with pytest.raises(LockedError) as refused:
            acquire(tmp_path)
    host, year = os.uname().nodename, time.strftime("%Y")
    assert f"in use by process {pid} on {host} since {year}-" in str(refused.value)
    assert acquire(tmp_path) < SILENCE_S  # it was killed
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_known_by_its_heartbeat(tmp_path: Path) -> None:
    with holder(tmp_path):
        change(tmp_path, "host=.*", "host=another-node")
        with pytest.raises(LockedError, match="in use by"):
            acquire(tmp_path)
    assert SILENCE_S <= acquire(tmp_path) < SILENCE_S + 2


def test_the_id_of_a_dead_process_may_be_given_to_another(tmp_path: Path) -> None:
    with holder(tmp_path) as pid:
        os.kill(pid, signal.SIGSTOP)
        start = int(re.search(r"start=(\d+)", (tmp_path / "run.lock").read_text())[1])
        change(tmp_path, f"start={start}", f"start={start + 1}")
        assert acquire(tmp_path) < SILENCE_S


def test_who_has_lost_the_folder_stops(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    first.check()
    (tmp_path / "run.lock").unlink()
    second.acquire()
    deadline = time.monotonic() + 10
    with pytest.raises(LockedError, match=f"taken over by process {os.getpid()} "):
        while time.monotonic() < deadline:
            first.check()
            time.sleep(0.05)
    first.release()
    assert (tmp_path / "run.lock").exists()
    second.release()


def test_a_run_holds_its_folder_and_others_may_read_it(tmp_path: Path, monkeypatch) -> None:
    config = make_run(tmp_path, trainer={"num_steps": 1}, log={"tensorboard": False})
    held_during = []
    evaluate = lock_module.World.all_gather

    def spy(self, shard):
        held_during.append((config.run_dir / "run.lock").exists())
        return evaluate(self, shard)

    monkeypatch.setattr(lock_module.World, "all_gather", spy)
    train(config)
    assert held_during and all(held_during)
    assert not list(config.run_dir.glob("run.lock*"))
    with holder(config.run_dir):
        before = {path: path.read_bytes() for path in config.run_dir.glob("*.json*")}
        for resume in (False, True):
            with pytest.raises(LockedError, match="in use by"):
                train(config, resume=resume)
        assert {path: path.read_bytes() for path in before} == before
        export_checkpoint(config.run_dir, None, tmp_path / "out")
        write_report(config.run_dir)
        evaluate_model(config, str(config.run_dir / "model"))
    assert "trained" in json.loads((config.run_dir / "summary.json").read_text())


def test_a_run_that_has_lost_its_folder_writes_nothing_more(tmp_path: Path, monkeypatch) -> None:
    config = make_run(tmp_path, trainer={"checkpoint_every": 0}, log={"tensorboard": False})
    steps_left = iter(range(2))

    def check(self) -> None:
        if next(steps_left, None) is None:
            raise LockedError("taken over")

    monkeypatch.setattr(RunLock, "check", check)
    with pytest.raises(LockedError, match="taken over"):
        train(config)
    names = {path.name for path in config.run_dir.iterdir()}
    assert not names & {"model", "report.html", "checkpoints"}
    assert "trained" not in json.loads((config.run_dir / "summary.json").read_text())
    records = (config.run_dir / "metrics.jsonl").read_text()
    assert records.count('"kind": "train"') == 3
