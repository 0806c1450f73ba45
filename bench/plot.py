"""Pictures from the CSVs of the benchmarks, beside each of them.

    python -m bench.plot [FOLDER]        default: bench/results

One bar a variant: median time in ms, whiskers from the 20th to the 80th percentile, and the floor
as a line where the CSV has one. The shapes that most variants were measured at, in the order of the
file, at most six.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

from bench.harness import ROOT  # noqa: E402

_OURS = ("ours", "one pass", "two passes")
_SHAPE = ("T", "V", "D", "dtype", "pass")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def panels(rows: list[dict[str, str]]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Rows by shape and pass."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(f"{name}={row[name]}" for name in _SHAPE if row.get(name))].append(row)
    return found


def chosen(found: dict[tuple[str, ...], list[dict[str, str]]]) -> list[tuple[str, ...]]:
    """The shapes with most variants, at most six, in the order of the file."""
    most = max(map(len, found.values()))
    return [shape for shape, rows in found.items() if len(rows) == most][:6]


def label(row: dict[str, str]) -> str:
    share = row.get("active", "1")
    return row["variant"] if share == "1" else f"{row['variant']}, {share} active"


def draw(path: Path) -> Path:
    """Writes `<path>.svg`."""
    found = panels(read(path))
    shapes = chosen(found)
    most = len(found[shapes[0]])
    size = (7, len(shapes) * (0.3 * most + 0.9))
    figure, axes = pyplot.subplots(len(shapes), 1, figsize=size, squeeze=False)
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        rows = found[shape]
        medians, low, high = (
            [float(row[name]) for row in rows] for name in ("median_ms", "p20_ms", "p80_ms")
        )
        whiskers = [
            [max(0, m - x) for m, x in zip(medians, low, strict=True)],
            [max(0, x - m) for m, x in zip(medians, high, strict=True)],
        ]
        colors = [
            "C0" if row["variant"].startswith(("ours", "one", "two")) else "C7" for row in rows
        ]
        names = [label(row) for row in rows]
        axis.barh(names, medians, xerr=whiskers, color=colors)
        floors = [(i, float(row["floor_ms"])) for i, row in enumerate(rows) if "floor_ms" in row]
        for i, floor in floors:
            axis.plot([floor, floor], [i - 0.4, i + 0.4], color="C3")
        axis.invert_yaxis()
        axis.set_title(", ".join(shape), fontsize=9)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("ms (red: the floor)")
    figure.suptitle(f"{path.stem} on {found[shapes[0]][0]['device']}", fontsize=10)
    figure.tight_layout()
    out = path.with_suffix(".svg")
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "results")
    for path in sorted(parser.parse_args().folder.rglob("*.csv")):
        print(draw(path))


if __name__ == "__main__":
    main()
