"""The tables of a comparison, as texts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from prefix_rft.checks import UserError
from prefix_rft.compare.comparison import Comparison, Run
from prefix_rft.compare.results import TOTALS, Row, is_done
from prefix_rft.compare.statistics import Estimate, paired_estimate, t_estimate
from prefix_rft.config import OUTCOMES_FILE
from prefix_rft.metrics import is_fraction

BASE = "base"
_MINUS = "−"
Outcomes = dict[int, dict[str, float]]  # of a run: by index of the problem, by figure


@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in rows and columns, and what they are."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def make_tables(comparison: Comparison, runs: Sequence[Run], rows: Sequence[Row]) -> list[Table]:
    """Of the finished runs: results, results by group, budgets, differences to the reference."""
    by_cell = {cell: list(own) for cell, own in groupby(rows, key=lambda row: row["cell"])}
    figures = [
        name
        for name in rows[0]
        if is_fraction(name) and "_ci95" not in name and f"base_{name}" in rows[0]
    ]
    whole = [name for name in figures if "/" not in name]
    grouped = [name for name in figures if name.startswith("avg@") and "/" in name]
    tables = [
        _results(by_cell, [*whole, "response_length_mean", "entropy"], "Results"),
        _budgets(by_cell),
    ]
    if grouped:
        tables.insert(1, _results(by_cell, grouped, "Results by group"))
    compared = [name for name in whole if name.startswith(("greedy", "avg@"))] + grouped
    tables.append(_differences(comparison, runs, compared))
    return tables


def _results(by_cell: Mapping[str, list[Row]], figures: Sequence[str], title: str) -> Table:
    from_base = {row["seed"]: row for own in by_cell.values() for row in own if not row["start"]}
    body = [_result_row(BASE, list(from_base.values()), figures, "base_")]
    body += [_result_row(cell, own, figures, "") for cell, own in by_cell.items()]
    return Table(
        title=title,
        note="Mean over seeds, in brackets its 95% interval over seeds by Student's t, which one "
        "seed does not have. Fractions in percent, lengths in tokens, entropy in nats.",
        columns=("cell", "seeds", *(_heading(name) for name in figures)),
        rows=body,
    )


def _result_row(cell: str, own: list[Row], figures: Sequence[str], prefix: str) -> tuple[str, ...]:
    texts = []
    for name in figures:
        values = [row[prefix + name] for row in own if row.get(prefix + name) is not None]
        texts.append(_shown(name, t_estimate(values)) if values else "")
    return (cell, str(len(own)), *texts)


def _budgets(by_cell: Mapping[str, list[Row]]) -> Table:
    names = ["steps", *TOTALS, *(f"start_{name}" for name in TOTALS)]
    body = []
    for cell, own in by_cell.items():
        has_start = bool(own[0]["start"])
        means = [f"{fmean(row[name] for row in own):,.0f}" for name in names]
        means[len(TOTALS) + 1 :] = means[len(TOTALS) + 1 :] if has_start else [""] * len(TOTALS)
        body.append((cell, *means))
    return Table(
        title="Budgets",
        note=f"Means over seeds. {budget_statement(by_cell)} Seconds are those of the steps, "
        "without evaluations, on a machine that may have had other work.",
        columns=("cell", *(name.replace("_", " ") for name in names)),
        rows=body,
    )


def budget_statement(by_cell: Mapping[str, list[Row]]) -> str:
    """Whether the cells had equal budgets, the stages that they start from apart."""
    parts = []
    for name, label in (("updates", "Updates"), ("rollout_tokens", "Rollout tokens")):
        means = {cell: fmean(row[name] for row in own) for cell, own in by_cell.items()}
        some = {cell: mean for cell, mean in means.items() if mean}
        if not some:
            parts.append(f"{label}: none in any cell.")
            continue
        low, high = min(some, key=some.get), max(some, key=some.get)
        if some[low] == some[high]:
            text = f"{label}: equal, {some[low]:,.0f} a run"
        else:
            text = (
                f"{label}: not equal, from {some[low]:,.0f} ({low}) to {some[high]:,.0f} ({high}), "
                f"a factor of {some[high] / some[low]:.2f}"
            )
        if none := [cell for cell in means if cell not in some]:
            text += f"; none in {', '.join(none)}"
        parts.append(f"{text}.")
    chained = [cell for cell, own in by_cell.items() if own[0]["start"]]
    if chained:
        parts.append(
            f"The stages that {', '.join(chained)} start from come on top: the columns start."
        )
    return " ".join(parts)


def _differences(comparison: Comparison, runs: Sequence[Run], figures: Sequence[str]) -> Table:
    outcomes = {
        (run.cell, run.seed): found
        for run in runs
        if is_done(run) and (found := read_outcomes(run)) is not None
    }
    reference = comparison.reference
    body = []
    for cell in comparison.cells:
        seeds = [seed for name, seed in outcomes if name == cell and (reference, seed) in outcomes]
        if cell == reference or not seeds:
            continue
        texts, num = [], 0
        for figure in figures:
            ours, theirs = (
                [_of_figure(outcomes[name, seed], figure) for seed in seeds]
                for name in (cell, reference)
            )
            estimate = paired_estimate(ours, theirs) if all((*ours, *theirs)) else None
            num = max(num, estimate.num if estimate else 0)
            texts.append(_shown_difference(estimate) if estimate else "")
        body.append((cell, str(len(seeds)), str(num), *texts))
    return Table(
        title=f"Difference to {reference}",
        note=f"Percentage points, cell minus {reference}, problem by problem, each the mean over "
        "the seeds that both have; in brackets the 95% interval of a bootstrap over problems. It "
        "says how far other problems could move the difference of these trained models, not how "
        "far other seeds could. * the interval does not hold 0; with many cells some will not by "
        "chance.",
        columns=("cell", "seeds", "problems", *map(_heading, figures)),
        rows=body,
    )


def read_outcomes(run: Run) -> Outcomes | None:
    """Greedy and mean sampled correctness by problem, group by group too; None: not on disk."""
    path = run.folder / OUTCOMES_FILE
    if not path.is_file():
        return None
    found: Outcomes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            each = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: no valid JSON: {error}") from None
        values = {}
        if each["greedy"] is not None:
            values["greedy"] = float(each["greedy"])
        if each["num_samples"]:
            values["avg"] = each["num_correct"] / each["num_samples"]
        grouped = {f"{name}/{each['group']}": x for name, x in values.items()}
        found[each["index"]] = values | (grouped if each["group"] is not None else {})
    return found


def _of_figure(outcomes: Outcomes, figure: str) -> dict[int, float]:
    """The values by problem of a figure such as avg@8/hard."""
    measure, separator, group = figure.partition("/")
    name = measure.partition("@")[0] + separator + group
    return {index: values[name] for index, values in outcomes.items() if name in values}


def _heading(name: str) -> str:
    return name.removesuffix("_mean").removesuffix("_frac").replace("_", " ")


def _shown(name: str, estimate: Estimate) -> str:
    if is_fraction(name):
        return _with_interval(estimate, lambda x: f"{100 * x:.1f}")
    decimals = 3 if name == "entropy" else 1
    return _with_interval(estimate, lambda x: f"{x:.{decimals}f}")


def _shown_difference(estimate: Estimate) -> str:
    low, high = estimate.interval
    mark = "" if low <= 0 <= high else " *"
    return _with_interval(estimate, lambda x: f"{100 * x:+.1f}") + mark


def _with_interval(estimate: Estimate, show: Callable[[float], str]) -> str:
    texts = [show(x).replace("-", _MINUS) for x in (estimate.mean, *(estimate.interval or ()))]
    return texts[0] if len(texts) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def console_table(tables: Sequence[Table]) -> Table:
    """What fits on a terminal: greedy, avg@k and its difference to the reference."""
    results, differences = tables[0], tables[-1]
    shown = [
        place
        for place, column in enumerate(results.columns)
        if column in ("cell", "seeds", "greedy") or column.startswith("avg@")
    ]
    [average] = [column for column in results.columns if column.startswith("avg@")]
    column = differences.columns.index(average)
    differing = {row[0]: row[column] for row in differences.rows}
    return Table(
        title="",
        note="",
        columns=(*(results.columns[place] for place in shown), differences.title.lower()),
        rows=[
            (*(row[place] for place in shown), differing.get(row[0], "")) for row in results.rows
        ],
    )


def markdown(tables: Sequence[Table]) -> str:
    """The tables, one after another."""
    parts = []
    for table in tables:
        lines = [f"| {' | '.join(row)} |" for row in (table.columns, *table.rows)]
        lines.insert(1, "|" + "---|" * len(table.columns))
        parts.append(f"## {table.title}\n\n" + "\n".join(lines) + f"\n\n{table.note}\n")
    return "\n".join(parts)
