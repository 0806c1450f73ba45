"""Problems back to rows: a file that `data.path` reads, with other demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefix_rft.data.columns import KNOWN_MAPS, ColumnMap, find_map
from prefix_rft.data.prepare import open_thought
from prefix_rft.data_types import Problem

# Columns that say where a dataset has what: with another layout they would be taken for that.
_OF_LAYOUTS = {name for known in KNOWN_MAPS for name in known.needs} | {"target"}


class FlatRows:
    """Rows `prompt`, `answer`, `demonstration` of problems; other columns of theirs are kept.

    Args:
        problems: of one source, at least one.
        columns: `data.columns`, by which they were read.
    Raises:
        DataError: see `find_map`.
    """

    def __init__(self, problems: Sequence[Problem], columns: Mapping[str, str]) -> None:
        source = [problem.columns for problem in problems]
        self._layout: ColumnMap = find_map(source, columns, key="data.columns")
        self._left_out = _OF_LAYOUTS | set(columns.values())

    def row(self, problem: Problem, demonstration: str | None) -> dict[str, Any]:
        """The prompt is the text or the messages of the source, without template."""
        prompt = self._layout.read(problem.columns).prompt
        flat = {"prompt": prompt, "answer": problem.answer, "demonstration": demonstration}
        left_out = self._left_out | flat.keys()
        return flat | {k: v for k, v in problem.columns.items() if k not in left_out}


def begun_thought(prompt: str) -> str:
    """What a rendered prompt has already begun of the response: a `<think>` at its end, or "".

    A demonstration has it too, so that other chat templates can render it; where it is in the
    prompt, reading leaves it out.
    """
    found = open_thought.search(prompt)
    return found[0] if found else ""
