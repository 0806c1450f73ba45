"""What `prefix-rft eval --suite` does: each model, then the models beside the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefix_rft.checks import require
from prefix_rft.config import Config
from prefix_rft.evaluate import paired, results
from prefix_rft.evaluate.suite_run import evaluate_suites
from prefix_rft.evaluate.suites import SuiteOptions


def run_suites(
    config: Config, models: Sequence[str], options: SuiteOptions, out: Path, *, prints: bool
) -> None:
    """Evaluate each model into a folder of its own in `out`, and print the tables.

    Args:
        prints: False on the ranks but the first.
    """
    folders = [out / folder_name(model) for model in models]
    require(len(set(folders)) == len(folders), "model", "different models", list(models))
    console = Console(highlight=False, quiet=not prints)
    evaluated = []
    for model, folder in zip(models, folders, strict=True):
        evaluated.append(evaluate_suites(config, model, options, folder))
        _print(console, model, results.COLUMNS, results.table_rows(evaluated[-1]))
        for note in results.notes(evaluated[-1]):
            console.print(note, style="dim")
        console.print(
            f"wrote {folder / results.RESULTS_FILE}, index.html and the samples beside it"
        )
    for model, other in zip(models[1:], evaluated[1:], strict=True):
        pairs = paired.compare(evaluated[0], other)
        title = f"{model} (second) minus {models[0]} (first), paired over problems"
        _print(console, title, paired.COLUMNS, paired.table_rows(pairs))
        for line in paired.changes(pairs):
            console.print(line, style="dim")


def folder_name(model: str) -> str:
    """A model's path as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


def _print(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        justify = "left" if column in columns[:1] else "right"
        table.add_column(column, justify=justify, no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
