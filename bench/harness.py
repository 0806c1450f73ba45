"""What every benchmark needs: interleaved times, peak memory in fresh processes, rows of CSV."""

import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
MIB = 2**20


def interleaved_ms(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall time of each call in ms, [repeats] a variant, in turns, after one warm-up each.

    Taking turns puts a noisy neighbour on all variants alike, so their ratios hold better than
    their times.
    """
    for call in variants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(times_ms) == 1:
        times_ms = times_ms * 2
    fifths = quantiles(times_ms, n=10, method="inclusive")
    return {"median_ms": fifths[4], "p20_ms": fifths[1], "p80_ms": fifths[7]}


def peak_above_mib(call: Callable[[], Any]) -> float:
    """How far the resident set of this process rises above its present size, at most, in MiB.

    Linux. `ru_maxrss` would not do: a child starts with the peak of the process that made it.
    """
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_fresh_process(module: str, arguments: list[str]) -> Any:
    """Runs `python -m module *arguments`, and returns the JSON on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def require_triton(name: str) -> None:
    """Ends the program with status 2 where triton, which benchmark `name` is about, is missing."""
    if find_spec("triton") is None:
        print(
            f"error: {name} needs triton; run pip install '.[test]' in a checkout", file=sys.stderr
        )
        sys.exit(2)


def machine() -> dict[str, str]:
    """Device, versions and commit: columns of every row."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--", "kernels", "bench/*.py"):
        commit += "-dirty"
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT.parent
    ).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_rows(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints the rows as a table, and writes them as CSV."""
    columns, cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if path is not None:
        write_csv(rows, path)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    columns, cells = _cells(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *cells])


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = list(rows[0])
    return columns, [[_text(row[column]) for column in columns] for row in rows]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
