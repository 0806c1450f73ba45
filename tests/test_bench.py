"""Every benchmark runs, on tiny shapes, and writes what a figure needs; and times on a CPU."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rft_kernels import prefix_rft_loss, select_top_entropy, token_stats

from bench import device, plot

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("__init__", "harness", "device", "green", "plot")
OPS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in SHARED)
BY_THE_SCRIPT = ("token_stats", "policy_loss", "one_launch", "selection")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def check_rows(path: Path) -> None:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 1
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert all(row[name] for name in ("device", "torch", "commit", "date"))
        if "of_floor" in row:
            assert float(row["of_floor"]) > 0 and float(row["copy_gb_s"]) > 0
        if "max_err_dlogits" in row:
            assert float(row["max_err_dlogits"]) < 0.02


@pytest.mark.parametrize("op", [op for op in OPS if op not in BY_THE_SCRIPT])
def test_smoke(op, tmp_path):
    out = tmp_path / "rows.csv"
    done = run(
        sys.executable, "-m", f"bench.{op}", "--smoke", "--threads", "1", "--out", str(out)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_rows(out)
    if op == "autotune":
        assert "2: ((64, RowLaunch(" in done.stdout


def test_gpu_check_smoke(tmp_path):
    """The script of the GPU runs its parts on a CPU: benchmarks, tests, pictures."""
    options = {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": ""}
    done = run("bash", "bench/gpu_check.sh", "--smoke", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts ok" in done.stdout
    ran, skipped = re.search(r"(\d+) tests ran, (\d+) were skipped, 0 failed", done.stdout).groups()
    assert int(ran) > 5 and (int(skipped) > 0 or torch.cuda.is_available())
    for op in BY_THE_SCRIPT:
        check_rows(tmp_path / f"{op}.csv")
        assert (tmp_path / f"{op}.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_check_goes_on_after_a_failing_part(tmp_path):
    """Wheels that do not exist fail their part and the script, and nothing else."""
    missing = str(tmp_path / "none")
    options = {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": missing}
    options["PARTS"] = "rivals pictures"
    done = run("bash", "bench/gpu_check.sh", "--smoke", **options)
    assert done.returncode == 1
    assert "rivals: FAILED" in done.stdout and "pictures: ok" in done.stdout
    assert "some parts FAILED" in done.stdout


def test_nothing_is_timed_while_tests_are_red(tmp_path):
    code = (
        "from bench.device import require_green; require_green(['tests/no_such_test.py']);"
        "print('timed')"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1 and "tests are red" in done.stderr and "timed" not in done.stdout


TESTS = """
import pytest
@pytest.mark.skip
def test_skipped(): ...
def test_passes(): ...
def test_fails(): assert False
"""


@pytest.mark.parametrize(
    "kept, status, printed",
    [
        ("skipped", 1, "0 tests ran, 1 were skipped, 0 failed"),
        ("none", 1, "0 tests ran, 0 were skipped, 0 failed"),
        ("skipped or passes", 0, "1 tests ran, 1 were skipped, 0 failed"),
        ("passes or fails", 1, "2 tests ran, 0 were skipped, 1 failed"),
    ],
)
def test_green_is_some_that_ran(kept, status, printed, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    done = run(sys.executable, "-m", "bench.green", str(tmp_path), "-k", kept)
    assert (done.returncode, printed in done.stdout) == (status, True), done.stdout


def test_the_exact_loss_of_liger_is_its_own():
    """Liger's kernels are held to the loss they define, which has advantages of sequences."""
    pytest.importorskip("liger_kernel")
    code = """
import torch
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
from bench import policy_loss
torch.manual_seed(0)
logits = torch.randn(64, 61) * 3
batch = policy_loss.Batch(logits, 1.0)
batch.old_log_probs += 0.3 * torch.randn(64)
theirs = lambda x, b: policy_loss.liger_loss(triton_grpo_loss, x, b)
found = lambda x, b: policy_loss.both(theirs, x, b)
for exact in (policy_loss.exact_liger, policy_loss.exact_loss):
    columns = policy_loss.error_columns(found, exact, logits, batch)
    print(columns["max_err_loss"] < 1e-6, columns["max_err_dlogits"] < 1e-6)
"""
    done = run(sys.executable, "-c", code, TRITON_INTERPRET="1")
    assert done.stdout.splitlines()[-2:] == ["True True", "False False"], done.stderr


def test_compilations_stop_where_their_time_is_over(monkeypatch, capsys):
    """Those left out are named; those that fail are left out too."""
    monkeypatch.setattr(sys, "argv", ["bench", "--tests-green", "--budget-s", "3"])
    monkeypatch.setattr(device, "copy_gb_s", lambda *args, **options: 1.0)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    bench = device.Bench(None, tests=[], smoke_test="")
    clock = iter(range(0, 60, 6))  # hundredths of a second a compilation, told as 0.6 s
    monkeypatch.setattr(device.time, "monotonic", lambda: next(clock) / 10)
    calls = []
    found = [bench.compiled(len, lambda f: calls.append(f), {"T": i}) for i in range(3)]
    assert [list(x) for x in found] == [["torch.compile"], [], []] and calls == [len]
    assert bench.skipped == [f"torch.compile, T={i}: out of time for compiling" for i in (1, 2)]

    def refuse(function):
        raise RuntimeError("no compiler")

    bench = device.Bench(None, tests=[], smoke_test="")
    assert bench.compiled(len, refuse, {"T": 9}) == {}
    assert bench.skipped == ["torch.compile, T=9: RuntimeError: no compiler"]


def test_pictures_of_the_committed_figures(tmp_path):
    """Time and memory where both were measured; a CSV without times is left out."""
    for path in (ROOT / "bench/results/cpu").glob("*.csv"):
        shutil.copy(path, tmp_path)
    done = run(sys.executable, "-m", "bench.plot", str(tmp_path))
    assert done.returncode == 0, done.stderr
    drawn = [path.stem for path in tmp_path.glob("*.png")]
    assert "linear_loss" in drawn and "testbed" not in drawn
    assert "testbed.csv: no times to draw" in done.stdout
    rows = plot.read(tmp_path / "linear_loss.csv")
    assert {plot.kind(row) for row in rows} == {"ours", "others", "the floor"}
    assert plot.unit_of("median_ms", 5275) == ("s", 1e-3)


@pytest.fixture
def rows() -> dict:
    rand = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=rand).requires_grad_()
    targets = torch.randint(1000, (64,), generator=rand)
    return {"logits": logits, "targets": targets}


def test_time_of_token_stats(benchmark, rows):
    found = benchmark(lambda: token_stats(**rows))
    assert found.entropy.shape == (64,)


def test_time_of_the_loss(benchmark, rows):
    mask = torch.ones(64, dtype=torch.bool)
    options = (torch.zeros(64), torch.ones(64), mask, torch.arange(64) < 32)

    def both():
        loss = prefix_rft_loss(*rows.values(), *options, normalizer=64).loss
        return torch.autograd.grad(loss, rows["logits"])[0]

    assert benchmark(both).any()


def test_time_of_selection(benchmark):
    entropy, mask = torch.rand(4096), torch.ones(4096, dtype=torch.bool)
    assert benchmark(lambda: select_top_entropy(entropy, mask)).sum() == 4096 - 4096 * 4 // 5
