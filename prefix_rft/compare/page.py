"""One self-contained HTML page about a comparison: tables, curves, what was run."""

from collections.abc import Mapping, Sequence
from html import escape

from prefix_rft.compare.comparison import Comparison, Run
from prefix_rft.compare.curves import Point, curves_html, points
from prefix_rft.compare.results import is_done
from prefix_rft.compare.table import Table
from prefix_rft.metrics import CSS

_OWN_CSS = """
main { max-width: 100rem; }
.table { font-size: 0.85rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
.table + p { margin: 0.5rem 0 0; max-width: 60rem; }
"""
Curves = Mapping[str, Sequence[list[Point]]]


def page_html(
    comparison: Comparison, runs: Sequence[Run], tables: Sequence[Table], file_text: str
) -> str:
    """The page of the runs that are done; it asks for nothing outside itself."""
    done = [run for run in runs if is_done(run)]
    missing = [run.name for run in runs if run not in done]
    about = f"{len(done)} of {len(runs)} runs are done"
    if missing:
        about += f"; missing: {', '.join(missing)}"
    results = "".join(map(_table, tables))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(comparison.name)} - prefix-rft compare</title>"
        f"<style>{CSS}{_OWN_CSS}</style></head><body><main>"
        f"<header><h1>{escape(comparison.name)}</h1><p>{escape(about)}</p></header>"
        f"{results}{_curves(comparison, done)}"
        "<h2>What was run</h2><details class='group'><summary>the file</summary>"
        f"<pre>{escape(file_text)}</pre></details></main></body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2><div class="table"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="muted"><small>{escape(table.note)}'
        "</small></p>"
    )


def _curves(comparison: Comparison, done: Sequence[Run]) -> str:
    """Cells with the most seeds on one row of charts, those with fewer beside their method."""
    by_cell: dict[str, list[list[Point]]] = {}
    for run in done:
        by_cell.setdefault(run.cell, []).append(points(run))
    cells = {cell: by_cell[cell] for cell in comparison.cells if cell in by_cell}
    most = max(len(cell.seeds) for cell in comparison.cells.values())
    main = [cell for cell in cells if len(comparison.cells[cell].seeds) == most]
    others = [cell for cell in cells if cell not in main]
    parts = [_charts({cell: cells[cell] for cell in main}, "Accuracy")]
    if others:
        methods = {comparison.cells[cell].config.method.name for cell in others}
        beside = [
            cell
            for cell in main
            if comparison.cells[cell].start is None
            and comparison.cells[cell].config.method.name in methods
        ]
        shown = {cell: cells[cell] for cell in [*beside, *others]}
        parts.append(_charts(shown, "Accuracy of the cells with fewer seeds"))
    return "".join(parts)


def _charts(cells: Curves, title: str) -> str:
    if not cells:
        return ""
    styles = {cell: number for number, cell in enumerate(cells)}
    figures = list(dict.fromkeys(name for runs in cells.values() for name in runs[0][-1].figures))
    averages = [name for name in figures if name.startswith("avg@")]
    whole = [name for name in averages if "/" not in name]
    wanted = [(axis, name) for name in whole for axis in ("steps", "tokens", "seconds")]
    wanted += [("steps", "greedy")]
    wanted += [("steps", name) for name in averages if "/" in name]
    charts = [curves_html(cells, axis, name, styles) for axis, name in wanted]
    drawn = "".join(filter(None, charts))
    if not drawn:
        return ""
    return (
        f"<h2>{escape(title)} <small>mean over seeds, shaded from the lowest to the highest"
        f'</small></h2><div class="charts">{drawn}</div>'
    )
