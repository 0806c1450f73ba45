"""What runs have left in their folders, as rows of comparison.csv."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefix_rft.checks import UserError
from prefix_rft.compare.comparison import Comparison, Run
from prefix_rft.config import SUMMARY_FILE
from prefix_rft.metrics import METRICS_FILE, read_records

CSV_FILE = "comparison.csv"
ORIGIN_FILE = "origin.json"  # of what version of the code a run is
TOTALS = {
    "rollout_tokens": "rollout/generated_tokens_sum",
    "trained_tokens": "policy/loss_tokens_sum",
    "updates": "optim/updates_sum",
    "seconds": "time/step_s",
}
_ENTROPY = "policy/continuation_entropy_mean"

Row = dict[str, Any]


def read_summary(run: Run) -> dict[str, Any]:
    """summary.json of a run; {} where there is none yet."""
    path = run.folder / SUMMARY_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no valid JSON: {error}") from None


def is_done(run: Run) -> bool:
    """Whether the run has its results and its model."""
    return {"trained", "model_step"} <= read_summary(run).keys()


def train_records(run: Run) -> list[dict[str, Any]]:
    return [each for each in all_records(run) if each["kind"] == "train"]


def all_records(run: Run) -> list[dict[str, Any]]:
    path = run.folder / METRICS_FILE
    return read_records(path) if path.is_file() else []


def totals(run: Run) -> dict[str, float]:
    """Tokens generated and trained on, updates, and seconds of all steps, without evaluations."""
    records = train_records(run)
    sums = {
        name: sum(record.get(metric) or 0 for record in records) for name, metric in TOTALS.items()
    }
    return {name: round(x, 1) if name == "seconds" else round(x) for name, x in sums.items()}


def start_totals(run: Run) -> dict[str, float]:
    """The totals of all runs that this one starts from, one after another."""
    sums: dict[str, float] = dict.fromkeys(TOTALS, 0)
    start = run.start
    while start is not None:
        sums = {name: round(sums[name] + x, 1) for name, x in totals(start).items()}
        start = start.start
    return sums


def row_of(run: Run) -> Row:
    """The row of a finished run: names as docs/compare.md has them."""
    summary, records = read_summary(run), train_records(run)
    entropies = [record[_ENTROPY] for record in records if record.get(_ENTROPY) is not None]
    return {
        "cell": run.cell,
        "seed": run.seed,
        "method": run.config.method.name,
        "start": "" if run.start is None else run.start.cell,
        "steps": len(records),
        **totals(run),
        **{f"start_{name}": x for name, x in start_totals(run).items()},
        "entropy": entropies[-1] if entropies else None,
        **dict(_flat(summary["trained"])),
        **{f"base_{name}": x for name, x in _flat(summary.get("base", {}))},
        **_origin(run),
    }


def _flat(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of an evaluation; texts, such as the grader's versions, are none."""
    for name, value in results.items():
        if isinstance(value, int | float):
            yield name, value
        elif name.endswith("_ci95"):
            yield from ((f"{name}_{end}", x) for end, x in zip(("low", "high"), value, strict=True))
        elif name == "statuses":
            yield from ((f"answers_{status}", count) for status, count in sorted(value.items()))


def _origin(run: Run) -> dict[str, str]:
    path = run.folder / ORIGIN_FILE
    origins = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    names = ("version", "commit")
    return {name: " ".join(dict.fromkeys(each[name] for each in origins)) for name in names}


def add_origin(run: Run, origin: Mapping[str, str]) -> None:
    """Note the version of the code that a run is started or resumed with."""
    path = run.folder / ORIGIN_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if origin not in known:
        write_text(path, json.dumps([*known, dict(origin)]) + "\n")


def finished_rows(runs: Sequence[Run], comparison: Comparison) -> list[Row]:
    """The rows of all finished runs: cells in the order of the file, then seeds."""
    order = list(comparison.cells)
    done = [run for run in runs if is_done(run)]
    return [row_of(run) for run in sorted(done, key=lambda run: (order.index(run.cell), run.seed))]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows at once; a figure that a row does not have is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    last = [name for name in columns if name in ("version", "commit")]
    columns = [name for name in columns if name not in last] + last
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
