"""Accuracy against steps, tokens and seconds: a line a cell, the mean over its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from prefix_rft.compare.comparison import Run
from prefix_rft.compare.results import all_records
from prefix_rft.metrics import CSS_COLOURS, SERIES, figure_html

AXES = {
    "steps": "steps, of all stages",
    "tokens": "tokens generated and trained on, of all stages",
    "seconds": "seconds of the steps, of all stages",
}
_STYLES = ("solid", (0, (4, 2)), (0, (1, 1.5)))  # one after another when the colours are used up
_DASHES = (None, (6, 3), (2, 2))  # the same in the legend, in pixels of line and gap


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation: what had been spent by then, on all stages, and its figures."""

    steps: int
    tokens: float
    seconds: float
    figures: Mapping[str, float]


def points(run: Run) -> list[Point]:
    """The evaluations of a run, one for a number of steps, the last of them in its file."""
    spent = {"steps": 0, "tokens": 0.0, "seconds": 0.0}
    if run.start is not None:
        last = points(run.start)[-1]
        spent = {name: getattr(last, name) for name in spent}
    first, found = spent["steps"], {}
    # An eval record of step t is of the weights after t steps; records of a step stand in order.
    records = sorted(all_records(run), key=lambda each: (each["step"], each["kind"] == "train"))
    for record in records:
        if record["kind"] == "eval":
            figures = {
                name.removeprefix("eval/"): value
                for name, value in record.items()
                if name.startswith("eval/") and value is not None
            }
            steps = first + record["step"]
            found[steps] = Point(**spent | {"steps": steps, "figures": figures})
        elif record["kind"] == "train":
            spent["tokens"] += record.get("rollout/generated_tokens_sum") or 0
            spent["tokens"] += record.get("policy/loss_tokens_sum") or 0
            spent["seconds"] += record.get("time/step_s") or 0
    return [found[steps] for steps in sorted(found)]


def curve(runs: Sequence[list[Point]], axis: str, figure: str) -> list[tuple[float, ...]]:
    """(x, mean, lowest, highest) over the seeds, at each number of steps that all of them have."""
    by_steps = [{point.steps: point for point in each if figure in point.figures} for each in runs]
    common = sorted(set(by_steps[0]).intersection(*by_steps[1:]))
    rows = []
    for steps in common:
        values = [each[steps].figures[figure] for each in by_steps]
        x = fmean(getattr(each[steps], axis) for each in by_steps)
        rows.append((x, fmean(values), min(values), max(values)))
    return rows


def curves_html(
    cells: Mapping[str, Sequence[list[Point]]], axis: str, figure: str, styles: Mapping[str, int]
) -> str | None:
    """The chart of one figure; None where no run has two evaluations of it.

    Args:
        styles: a number for each cell, which is its colour and dash on all charts.
    """
    curves = {cell: curve(runs, axis, figure) for cell, runs in cells.items()}
    curves = {cell: rows for cell, rows in curves.items() if len(rows) > 1}
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for cell, rows in curves.items():
            colour, style = SERIES[styles[cell] % len(SERIES)], styles[cell] // len(SERIES)
            xs, means, lows, highs = zip(*rows, strict=True)
            line = _STYLES[style % len(_STYLES)]
            axes.plot(xs, means, color=colour, linestyle=line, linewidth=1.6)
            axes.plot(xs[-1:], means[-1:], color=colour, marker="o", markersize=3)
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.07, linewidth=0)
        axes.set_xlim(left=0)

    return figure_html(
        title=figure,
        unit=f"over {AXES[axis]}",
        legend="".join(_legend(cell, styles[cell]) for cell in curves),
        draw=draw,
    )


def _legend(cell: str, style: int) -> str:
    colour = CSS_COLOURS[SERIES[style % len(SERIES)]]
    dashes = _DASHES[style // len(SERIES) % len(_DASHES)]
    background = colour
    if dashes:
        line, gap = dashes
        background = (
            f"repeating-linear-gradient(90deg,{colour} 0 {line}px,"
            f"transparent {line}px {line + gap}px)"
        )
    swatch = f"width:1.4rem;height:0.3rem;vertical-align:3px;background:{background}"
    return f'<li><i style="{swatch}"></i>{escape(cell)}</li>'
