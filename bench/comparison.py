"""The committed comparison as a table by tier and a picture, from its comparison.csv.

    python -m bench.comparison [FOLDER]        default: bench/results/cpu/testbed-methods

Prints the table that docs/comparison.md has, and writes comparison.png beside the CSV: avg@k of
each cell on each tier, the mean over its seeds, with the seeds as points.
"""

import argparse
import csv
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

from bench.harness import ROOT  # noqa: E402

FOLDER = ROOT / "results/cpu/testbed-methods"
TIERS = ("easy", "medium", "hard", "skill", "beyond")
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#B4B8BD")

Row = dict[str, str]


def read(folder: Path) -> dict[str, list[Row]]:
    """Rows by cell, in the order of the file."""
    cells: dict[str, list[Row]] = {}
    with (folder / "comparison.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            cells.setdefault(row["cell"], []).append(row)
    return cells


def accuracy(rows: list[Row], tier: str | None = None, prefix: str = "") -> list[float]:
    """avg@k of each run in percent, of one tier or of all problems."""
    [name] = [
        name
        for name in rows[0]
        if name.startswith(f"{prefix}avg@")
        and "_ci95" not in name
        and name.partition("/")[2] == (tier or "")
    ]
    return [100 * float(row[name]) for row in rows]


def table(cells: dict[str, list[Row]]) -> list[str]:
    """Lines of a Markdown table: means over seeds; of all problems also the lowest and highest."""
    head = ("cell", "seeds", "all", *TIERS, "rollout tokens", "trained tokens", "updates")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    # A run in which nothing was trained before starts from the base that all of them share.
    base = next(rows for rows in cells.values() if not rows[0]["start"])[:1]
    values = [_mean(accuracy(base, tier, "base_")) for tier in (None, *TIERS)]
    lines.append(f"| base | | {' | '.join(values)} | | | |")
    for cell, rows in cells.items():
        overall = accuracy(rows)
        spread = f" ({min(overall):.1f} – {max(overall):.1f})" if len(rows) > 1 else ""
        values = [_mean(overall) + spread, *(_mean(accuracy(rows, tier)) for tier in TIERS)]
        totals = [
            f"{fmean(_total(row, name) for row in rows) / 1000:.0f}k"
            for name in ("rollout_tokens", "trained_tokens")
        ]
        updates = f"{fmean(_total(row, 'updates') for row in rows):.0f}"
        cellular = " | ".join((cell, str(len(rows)), *values, *totals, updates))
        lines.append(f"| {cellular} |")
    return lines


def _mean(values: list[float]) -> str:
    return f"{fmean(values):.1f}"


def _total(row: Row, name: str) -> float:
    """Of the run and of the stage that it started from."""
    return float(row[name]) + float(row.get(f"start_{name}") or 0)


def draw(cells: dict[str, list[Row]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(cells) + 1.2), layout="constrained")
    for index, rows in enumerate(reversed(cells.values())):
        for k, (tier, color) in enumerate(zip(TIERS, _COLORS, strict=True)):
            values = accuracy(rows, tier)
            height = index + 0.3 - 0.15 * k
            axes.barh(height, fmean(values), 0.13, color=color, label=tier if not index else None)
            axes.plot(values, [height] * len(values), ".", color="#24292F", markersize=3)
    names = [f"{cell} ({len(rows)})" for cell, rows in reversed(cells.items())]
    axes.set_yticks(range(len(cells)), names)
    axes.set_xlim(0, 100)
    axes.set_xlabel("avg@4 after training, percent (points: seeds)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(TIERS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    found = read(folder)
    draw(found, folder / "comparison.png")
    print("\n".join(table(found)))
