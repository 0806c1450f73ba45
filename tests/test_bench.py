"""Every benchmark runs, on tiny shapes, and writes what a figure needs; and times on a CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rft_kernels import prefix_rft_loss, select_top_entropy, token_stats

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("__init__", "harness", "device", "plot")
OPS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in SHARED)
BY_THE_SCRIPT = ("token_stats", "policy_loss", "selection")


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
    """The script of the GPU runs its parts on a CPU: three benchmarks, tests, pictures."""
    options = {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": ""}
    done = run("bash", "bench/gpu_check.sh", "--smoke", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts ok" in done.stdout
    for op in BY_THE_SCRIPT:
        check_rows(tmp_path / f"{op}.csv")
        assert "<svg" in (tmp_path / f"{op}.svg").read_text()


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
