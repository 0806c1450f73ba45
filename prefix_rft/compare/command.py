"""The command `prefix-rft compare`: checks, the base, the runs, the tables."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import rich.table
from rich.console import Console

from prefix_rft.checks import ConfigError, require
from prefix_rft.compare.comparison import Comparison, Run, load_comparison
from prefix_rft.compare.jobs import CELL_FILE, Jobs
from prefix_rft.compare.page import page_html
from prefix_rft.compare.results import (
    CSV_FILE,
    add_origin,
    finished_rows,
    is_done,
    read_summary,
    write_csv,
    write_text,
)
from prefix_rft.compare.table import Table, console_table, make_tables, markdown
from prefix_rft.config import by_key, load_config, require_packages
from prefix_rft.data import resolve_base
from prefix_rft.metrics import METRICS_FILE
from prefix_rft.train import RunLock


def compare(
    name_or_path: str,
    *,
    jobs: int = 1,
    launcher: str | None = None,
    only: tuple[str, ...] | None = None,
    tables_only: bool = False,
    output_dir: Path | None = None,
) -> int:
    """Do the runs of a comparison that are not done yet, and write its tables.

    Args:
        jobs: runs at a time.
        launcher: starts each run in the place of python, such as "torchrun --nproc-per-node 8".
        only: names of cells; others are run only where these start from them. None: all.
        tables_only: run nothing.
    Returns:
        the exit status: 0, or 1 where a run failed.
    Raises:
        UserError: something the user can put right; nothing has been run.
        KeyboardInterrupt: the runs have saved and ended; the same call goes on.
    """
    require(jobs >= 1, "--jobs", "a whole number above 0", jobs)
    comparison = load_comparison(name_or_path, output_dir)
    runs = comparison.runs()
    chosen = comparison.with_starts(only) if only is not None else set(comparison.cells)
    if tables_only:
        write_tables(comparison, runs)
        return 0
    todo = [run for run in runs if run.cell in chosen]
    for run in todo:
        require_packages(run.config)
    lock = RunLock(comparison.folder)
    lock.acquire()
    try:
        _check_unchanged(todo)
        failures = _run(comparison, runs, todo, lock, jobs=jobs, launcher=launcher)
        write_tables(comparison, runs)
    except KeyboardInterrupt:
        _tell("stopped; the same command goes on")
        raise
    finally:
        lock.release()
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _run(
    comparison: Comparison,
    runs: list[Run],
    todo: list[Run],
    lock: RunLock,
    *,
    jobs: int,
    launcher: str | None,
) -> dict[str, str]:
    num_done = sum(map(is_done, todo))
    _tell(f"{comparison.name}: {len(todo)} runs in {comparison.folder}, {num_done} done already")
    if num_done == len(todo):
        return {}
    base = resolve_base(todo[0].config)  # the first run starts from no other
    _tell(f"base: {base}")
    origin = code_origin()

    def began(run: Run) -> None:
        lock.check()
        run.folder.mkdir(exist_ok=True)
        add_origin(run, origin)
        _tell(f"{run.name}: started, log in {run.folder}")

    def ended(run: Run, seconds: float) -> None:
        nonlocal num_done
        num_done += 1
        write_csv(finished_rows(runs, comparison), comparison.folder / CSV_FILE)
        greedy = read_summary(run)["trained"]["greedy"]
        _tell(f"{run.name}: done in {seconds:.0f} s, greedy {greedy:.1%}; {num_done}/{len(todo)}")

    return Jobs(jobs=jobs, launcher=launcher, tell=_tell).run_all(todo, began=began, ended=ended)


def write_tables(comparison: Comparison, runs: list[Run]) -> None:
    """comparison.csv, .md and .html of the runs that are done; the main figures on the console."""
    rows = finished_rows(runs, comparison)
    if not rows:
        _tell(f"{comparison.folder}: no run is done yet")
        return
    tables = make_tables(comparison, runs, rows)
    write_csv(rows, comparison.folder / CSV_FILE)
    write_text(comparison.folder / "comparison.md", f"# {comparison.name}\n\n{markdown(tables)}")
    page = page_html(comparison, runs, tables, comparison.text)
    write_text(comparison.folder / "comparison.html", page)
    _print(tables)
    _tell(f"wrote comparison.csv, comparison.md and comparison.html in {comparison.folder}")


def _check_unchanged(runs: list[Run]) -> None:
    """Steps that were done with another configuration are no part of this comparison.

    Raises:
        ConfigError: the first difference.
    """
    for run in runs:
        if not (run.folder / CELL_FILE).is_file() or not (run.folder / METRICS_FILE).is_file():
            continue
        before, now = by_key(load_config(run.folder / CELL_FILE)), by_key(run.config)
        for key, value in now.items():
            old = before.get(key)
            if key == "model.path" and run.start is not None:
                value, old = Path(str(value)).name, Path(str(old)).name
            if key in ("name", "output_dir") or key.startswith("log.") or old == value:
                continue
            raise ConfigError(
                f"cells.{run.cell}.{key}: expected {old!r}, with which the steps in {run.folder} "
                f"were done, got {value!r}: delete that folder, or choose another --output-dir"
            )


def code_origin() -> dict[str, str]:
    """The version of the package, and the commit where it is part of a checkout."""
    try:
        version = importlib.metadata.version("prefix-rft")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    package = Path(__file__).parents[1]
    is_tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "describe", "--always", "--dirty", "--exclude=*") if is_tracked else ""
    return {"version": version, "commit": commit}


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; "" where there is no git, or no repository."""
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def _print(tables: list[Table]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = console_table(tables)
    shown = rich.table.Table()
    for column in table.columns:
        is_name = column == "cell"
        shown.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def _tell(text: str) -> None:
    print(text, flush=True)
