"""Pictures from the CSVs of the benchmarks, beside each of them.

    python -m bench.plot [FOLDER]        default: bench/results

One bar a variant: median time, whiskers from the 20th to the 80th percentile, and where it was
measured peak memory; or the longest response that fits. The shapes that most variants were measured
at, or nearly, in the order of the file, at most six. A CSV with neither is left out.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from bench.harness import ROOT  # noqa: E402

Row = dict[str, str]

_OURS = ("ours", "one pass", "two passes", "one launch")
_FLOOR = ("three GEMMs", "bare GEMMs")  # a floor that is a variant; others have a column for it
_SHAPE = ("T", "D", "V", "dtype", "pass", "model", "training")
_LENGTH = "longest_tokens"
_MOST_BARS = 30  # of a panel
_NEARLY = 0.85
# Told apart by colour-blind eyes, and by their lightness in print.
_COLORS = {"ours": "#0072B2", "others": "#B4B8BD", "the floor": "#E69F00"}
_INK, _FAINT = "#24292F", "#6E7781"
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": "white",
}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def panels(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by shape and pass, and by active share where that would be too many a panel."""
    found = _by(_SHAPE, rows)
    if max(map(len, found.values())) <= _MOST_BARS:
        return found
    found = _by((*_SHAPE, "active"), rows)
    return {shape: [row | {"active": "1"} for row in part] for shape, part in found.items()}


def _by(columns: tuple[str, ...], rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(f"{name} = {row[name]}" for name in columns if row.get(name))].append(row)
    return found


def chosen(found: dict[tuple[str, ...], list[Row]]) -> list[tuple[str, ...]]:
    """The shapes with most variants, or nearly, at most six, in the order of the file."""
    most = max(map(len, found.values()))
    return [shape for shape, rows in found.items() if len(rows) >= _NEARLY * most][:6]


def label(row: Row) -> str:
    if "limit_gib" in row:
        return f"{row['variant']}, {row['limit_gib']} GiB"
    share = row.get("active", "1")
    return row["variant"] if share == "1" else f"{row['variant']}, {share} active"


def kind(row: Row) -> str:
    if row["variant"].startswith(_FLOOR):
        return "the floor"
    return "ours" if row["variant"].startswith(_OURS) else "others"


def values(rows: list[Row], column: str) -> list[float]:
    return [float(row.get(column) or "nan") for row in rows]


def unit_of(column: str, largest: float) -> tuple[str, float]:
    """The unit that suits the largest value, and what one of the column is in it."""
    if column.endswith("_tokens"):
        return "tokens", 1.0
    if column.endswith("_mib"):
        return ("GiB", 1 / 1024) if largest >= 1024 else ("MiB", 1.0)
    if largest >= 1000:
        return "s", 1e-3
    return ("ms", 1.0) if largest >= 1 else ("µs", 1e3)


def bars(axis: Axes, rows: list[Row], column: str, floor: list[float]) -> str:
    """One bar a row, its value beside it, and a mark at its floor; returns the unit."""
    found = values(rows, column)
    unit, scale = unit_of(column, max(x for x in found if not math.isnan(x)))
    found = [x * scale for x in found]
    places = range(len(rows))
    axis.barh(places, found, height=0.68, color=[_COLORS[kind(row)] for row in rows])
    ends = list(found)
    if column == "median_ms":
        low, high = ([x * scale for x in values(rows, f"p{p}_ms")] for p in (20, 80))
        whiskers = [
            [max(0, x - y) for x, y in zip(found, low, strict=True)],
            [max(0, y - x) for x, y in zip(found, high, strict=True)],
        ]
        axis.errorbar(found, places, xerr=whiskers, fmt="none", ecolor=_INK, elinewidth=1)
        ends = [max(pair) for pair in zip(found, high, strict=True)]
    for place, end, value in zip(places, ends, found, strict=True):
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        axis.annotate(
            text, (end, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8, color=_FAINT, bbox={"fc": "white", "ec": "none", "pad": 0.6},
        )  # fmt: skip
    for row, value in zip(rows, found, strict=True):
        if row["variant"] == _FLOOR[0] and column == "median_ms":
            axis.axvline(value, color=_COLORS["the floor"], lw=1.2, ls=(0, (4, 3)), zorder=1)
    for place, x in zip(places, floor, strict=True):
        axis.plot([x * scale] * 2, [place - 0.42, place + 0.42], color=_COLORS["the floor"], lw=2)
    axis.set_xlim(0, 1.12 * max(x for x in [*ends, *floor] if not math.isnan(x)))
    axis.set_yticks(places, [label(row) for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color="#E7E9EC", lw=0.8)
    return unit


def draw(path: Path) -> Path | None:
    """Writes `<path>.png`, if the CSV has times."""
    found = panels(read(path))
    shapes = chosen(found)
    first = found[shapes[0]]
    memory = all(not math.isnan(x) for shape in shapes for x in values(found[shape], "peak_mib"))
    if _LENGTH in first[0]:
        columns = {_LENGTH: "longest response, {} (more is better)"}
    elif "median_ms" in first[0]:
        columns = {"median_ms": "time, {} (less is better)"}
        columns |= {"peak_mib": "peak memory, {} (less is better)"} if memory else {}
    else:
        return None
    with pyplot.rc_context(_STYLE):
        size = (
            9.5 if len(columns) > 1 else 8,
            1 + sum(0.75 + 0.27 * len(found[x]) for x in shapes),
        )
        figure, axes = pyplot.subplots(
            len(shapes), len(columns), figsize=size, squeeze=False, sharey="row",
            layout="constrained",
        )  # fmt: skip
        for line, shape in zip(axes, shapes, strict=True):
            rows = found[shape]
            for axis, (column, title) in zip(line, columns.items(), strict=True):
                none = [math.nan] * len(rows)
                floor = values(rows, "floor_ms") if column == "median_ms" else none
                unit = bars(axis, rows, column, floor)
                axis.set_xlabel(title.format(unit), color=_FAINT, fontsize=8)
            line[0].invert_yaxis()  # of both columns, which share it
            line[0].set_title(",  ".join(shape), loc="left", fontsize=9, fontweight="bold")
        title = "{} on {device}, torch {torch}, commit {commit}".format(path.stem, **first[0])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(handles=legend(first), loc="outside lower left", ncols=4, frameon=False)
        out = path.with_suffix(".png")
        figure.savefig(out, dpi=160, metadata={"Software": None})
        pyplot.close(figure)
    return out


def legend(rows: list[Row]) -> list[Patch | Line2D]:
    kinds = {kind(row) for row in rows}
    handles = [Patch(color=color, label=name) for name, color in _COLORS.items() if name in kinds]
    if "floor_ms" in rows[0]:
        handles.append(Line2D([], [], color=_COLORS["the floor"], lw=2, label="its floor"))
    if "median_ms" in rows[0]:
        handles.append(Line2D([], [], color=_INK, lw=1, label="20th to 80th percentile"))
    return handles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "results")
    for path in sorted(parser.parse_args().folder.rglob("*.csv")):
        print(draw(path) or f"{path}: nothing to draw")


if __name__ == "__main__":
    main()
