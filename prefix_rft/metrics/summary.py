"""The table a run ends with: held-out results of base and trained model, as texts."""

from collections.abc import Mapping
from typing import Any

COLUMNS = ("held-out", "base", "trained", "change")


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of COLUMNS from summary.json's `base` and `trained`; what is missing is an empty text.

    Accuracies and shares, in [0, 1], come out as percent with their 95% interval, their change in
    points; counts per status and the intervals themselves get no row.
    """
    base, trained = summary.get("base", {}), summary.get("trained", {})
    names = [
        name
        for name, value in (base | trained).items()
        if isinstance(value, (int, float)) and name.partition("/")[0] != "num_problems"
    ]
    return [
        (
            name.removesuffix("_frac").replace("_", " "),
            _text(name, base),
            _text(name, trained),
            _change(name, base.get(name), trained.get(name)),
        )
        for name in names
    ]


def is_fraction(name: str) -> bool:
    """Whether the figure is a share; what follows a "/" names the problems it is about."""
    figure = name.partition("/")[0]
    return figure == "greedy" or figure.startswith(("avg@", "pass@")) or figure.endswith("_frac")


def _text(name: str, results: Mapping[str, Any]) -> str:
    value = results.get(name)
    if value is None:
        return ""
    if not is_fraction(name):
        return f"{value:.{_decimals(name)}f}"
    interval = results.get(f"{name}_ci95")
    around = f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else ""
    return f"{100 * value:.1f}%{around}"


def _change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    if is_fraction(name):
        return f"{100 * (after - before):+.1f}"
    return f"{after - before:+.{_decimals(name)}f}"


def _decimals(name: str) -> int:
    return 3 if name.startswith("reward") else 1
