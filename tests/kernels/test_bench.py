"""Every benchmark runs, on tiny shapes, and writes what a figure needs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in ("__init__", "harness")
)


@pytest.mark.parametrize("op", OPS)
def test_smoke(op, tmp_path):
    out = tmp_path / "rows.csv"
    subprocess.run(
        [sys.executable, "-m", f"bench.{op}", "--smoke", "--threads", "1", "--out", str(out)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 1
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert all(row[name] for name in ("device", "torch", "commit", "date"))
