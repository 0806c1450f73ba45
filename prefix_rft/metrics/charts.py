"""The curves of a run as inline SVG; their colours are CSS variables, for light and dark pages."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefix_rft.methods import Chart, declared_charts

Record = Mapping[str, Any]

# matplotlib writes a colour as hex; each stands for a CSS variable and is replaced in the SVG.
SERIES = [f"#0a0a0{i}" for i in range(1, 8)]
INK, GRID = "#0a0b01", "#0a0b02"
CSS_COLOURS = {hex_: f"var(--series-{i})" for i, hex_ in enumerate(SERIES, start=1)}
CSS_COLOURS |= {INK: "var(--muted)", GRID: "var(--line)"}

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
SMOOTHED_FROM = 30  # points; a curve that long is drawn faint under its running mean
SMOOTHED_FRACTION = 0.1  # points in one mean, as a fraction of all


REWARD = Chart(title="Reward", series={"reward/mean": "all"})
CHARTS = (
    Chart(
        title="Entropy",
        unit="nats",
        series={"policy/continuation_entropy_mean": "continuation"},
    ),
    Chart(title="Loss", series={"policy/loss_mean": "mean"}, limits=(None, None)),
    Chart(
        title="Response length",
        unit="tokens",
        series={"rollout/response_length_mean": "mean"},
    ),
    Chart(
        title="Rollouts",
        unit="fraction",
        series={
            "rollout/left_out_frac": "without gradient, left out",
            "rollout/truncated_frac": "truncated",
            "rollout/mismatched_frac": "mismatched, left out",
        },
    ),
    Chart(
        title="Clipped tokens",
        unit="fraction",
        series={"policy/clip_low_frac": "low", "policy/clip_high_frac": "high"},
    ),
    Chart(
        title="Time of a step",
        unit="seconds",
        form="stack",
        series={
            "time/push_s": "push weights",
            "time/generate_s": "generate",
            "time/reward_s": "reward",
            "time/wait_s": "wait for other ranks",
            "time/old_policy_s": "old policy",
            "time/reference_s": "reference",
            "time/update_s": "update",
        },
    ),
    Chart(
        title="Throughput",
        unit="tokens/s",
        series={
            "throughput/step_tokens_per_s": "whole step",
            "throughput/generate_tokens_per_s": "generation",
            "throughput/update_tokens_per_s": "update",
        },
    ),
    Chart(
        title="Grades",
        unit="rollouts",
        form="stack",
        series={
            "grader/correct_sum": "correct",
            "grader/wrong_sum": "wrong",
            "grader/no_answer_sum": "no answer",
            "grader/timeout_sum": "timeout",
            "grader/error_sum": "error",
        },
    ),
    Chart(title="Gradient norm", series={"optim/grad_norm_mean": "norm"}),
    Chart(title="Learning rate", series={"optim/lr": "lr"}),
    Chart(
        title="Approximate KL",
        unit="nats",
        limits=(None, None),
        series={"policy/approx_kl_mean": "to the policy before the update"},
    ),
    Chart(
        title="KL to the reference",
        unit="nats",
        limits=(None, None),
        series={"policy/ref_kl_mean": "mean of a token"},
    ),
    Chart(
        title="Log-prob gap",
        unit="nats, engine against trainer",
        series={
            "rollout/log_prob_gap_mean": "mean",
            "rollout/log_prob_gap_p99": "99th percentile",
            "rollout/log_prob_gap_max": "max",
        },
    ),
)


def all_charts() -> list[Chart]:
    """The charts of every run with those that methods declare; those of one title are merged."""
    charts: dict[str, Chart] = {}
    for chart in (REWARD, *declared_charts(), *CHARTS):
        known = charts.get(chart.title, chart)
        charts[chart.title] = replace(known, series={**known.series, **chart.series})
    return list(charts.values())


def accuracy_charts(records: Sequence[Record]) -> list[Chart]:
    """Accuracies of the evaluations, then each by group of problems, as many as there are colours.

    Which k and which groups they have is known from their names only.
    """
    names = {
        name: name.removeprefix("eval/")
        for record in records
        if record["kind"] == "eval"
        for name in record
        if name.startswith(("eval/greedy", "eval/avg@", "eval/pass@"))
    }
    whole = {name: label for name, label in names.items() if "/" not in label}
    by_figure: dict[str, dict[str, str]] = {}
    for name, label in names.items():
        figure, separator, group = label.partition("/")
        if separator:
            by_figure.setdefault(figure, {})[name] = group
    charts = [Chart(title="Held-out accuracy", series=whole, kind="eval", limits=(0.0, 1.0))]
    for figure, groups in by_figure.items():
        for start in range(0, len(groups), len(SERIES)):
            series = dict(list(groups.items())[start : start + len(SERIES)])
            title = f"Held-out {figure} by group" + (f", from {start + 1}" if start else "")
            charts.append(Chart(title=title, series=series, kind="eval", limits=(0.0, 1.0)))
    return charts


def chart_html(chart: Chart, records: Sequence[Record]) -> str | None:
    """The chart with its title and legend as an HTML figure; None where it has no value at all."""
    offset = 1 if chart.kind == "train" else 0  # a train record of step t: t + 1 steps done
    rows = [record for record in records if record["kind"] == chart.kind]
    curves = {}
    for colour, (metric, legend) in zip(SERIES, chart.series.items(), strict=False):
        points = [(r["step"] + offset, r[metric]) for r in rows if r.get(metric) is not None]
        if points:
            curves[metric] = (legend, colour, *zip(*points, strict=True))
    if not curves:
        return None
    legend = "".join(
        f'<li><i style="background:{CSS_COLOURS[colour]}"></i>{escape(text)}</li>'
        for text, colour, *_ in curves.values()
    )
    return figure_html(
        title=chart.title,
        unit=chart.unit,
        legend=legend,
        draw=lambda axes: _draw(axes, chart, curves),
    )


def figure_html(*, title: str, unit: str, legend: str, draw: Callable[[Axes], None]) -> str:
    """An HTML figure: title with unit, the items of a legend, and what `draw` draws, as SVG."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for hex_, variable in CSS_COLOURS.items():
        svg = svg.replace(hex_, variable)
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f"<figure><figcaption><h3>{escape(title)}{small}</h3><ul>{legend}</ul></figcaption>"
        f"{svg}</figure>"
    )


def _draw(axes: Axes, chart: Chart, curves: Mapping[str, tuple]) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if chart.form == "stack":
        xs = sorted({x for _, _, points, _ in curves.values() for x in points})
        heights = []
        for _, _, points, values in curves.values():
            known = dict(zip(points, values, strict=True))
            heights.append([known.get(x, 0.0) for x in xs])
        colours = [colour for _, colour, *_ in curves.values()]
        if len(xs) == 1:  # an area needs two points
            xs, heights = [xs[0] - 0.5, xs[0] + 0.5], [row * 2 for row in heights]
        axes.stackplot(xs, heights, colors=colours, alpha=0.85, linewidth=0)
    else:
        edges = list(chart.series)[:2] if chart.form == "window" else []
        for metric, (_, colour, xs, values) in curves.items():
            _draw_line(axes, xs, values, colour, thin=metric in edges)
        if edges and all(edge in curves for edge in edges):
            low, high = (dict(zip(*curves[edge][2:], strict=True)) for edge in edges)
            xs = [x for x in low if x in high]
            axes.fill_between(
                xs, [low[x] for x in xs], [high[x] for x in xs], color=SERIES[0], alpha=0.15, lw=0
            )
    last = max(xs[-1] for _, _, xs, _ in curves.values())
    axes.set_xlim(0, 1.01 * max(last, 1))  # room for the last marker
    axes.set_ylim(*chart.limits)


def _draw_line(
    axes: Axes, xs: Sequence[float], values: Sequence[float], colour: str, *, thin: bool
) -> None:
    if len(xs) >= SMOOTHED_FROM and not thin:
        axes.plot(xs, values, color=colour, linewidth=0.8, alpha=0.3)
        reach = round(len(xs) * SMOOTHED_FRACTION / 2)
        values = [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(xs))]
    marker = "o" if len(xs) < 8 else None
    width = 0.9 if thin else 1.8
    axes.plot(xs, values, color=colour, linewidth=width, marker=marker, markersize=3)
