"""The unusable or changed rows of a dataset, counted by kind, with an example of each."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Kind = Literal[
    "no_prompt",
    "no_answer",
    "no_marker",
    "unparseable_answer",
    "long_prompt",
    "long_demonstration",
    "short_demonstration",
    "left_out_thought",
    "merged_boundary",
]

_MEANING: dict[Kind, str] = {
    "no_prompt": "dropped: no prompt (a text, or messages that end with the user's)",
    "no_answer": "dropped: no usable answer",
    "no_marker": 'dropped: no number behind "####" in the answer, as most rows have it; other '
    "columns can be named in data.columns",
    "unparseable_answer": "dropped: the grader cannot parse the gold answer",
    "long_prompt": "dropped: prompt above data.max_prompt_tokens",
    "long_demonstration": "without demonstration: above rollout.max_response_length - 1 tokens",
    "short_demonstration": "without demonstration: below 2 tokens, nothing to cut",
    "left_out_thought": "whose demonstration loses its thought: the chat template ends with an "
    "empty one",
    "merged_boundary": "whose prompt and demonstration would share a token: the demonstration is "
    "tokenised without its prompt",
}
# Kinds that only tell what was done: these rows are usable.
_NOTES: frozenset[Kind] = frozenset({"left_out_thought", "merged_boundary"})
_EXAMPLE_CHARS = 120


def example_text(value: Any) -> str:
    """A value as an example shows it: its start, in one line."""
    text = repr(value)
    return text if len(text) <= _EXAMPLE_CHARS else text[:_EXAMPLE_CHARS] + "..."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Rows of one kind, unusable or changed: how many, and the first of them."""

    kind: Kind
    count: int
    row: int  # index of the example
    example: str

    @property
    def is_note(self) -> bool:
        return self.kind in _NOTES

    def __str__(self) -> str:
        rows = "1 row" if self.count == 1 else f"{self.count} rows"
        return f"{rows} {_MEANING[self.kind]}; the first is row {self.row}: {self.example}"


class Findings:
    """Collects findings while rows are read."""

    def __init__(self) -> None:
        self._found: dict[Kind, Finding] = {}

    def add(self, kind: Kind, row: int, example: str) -> None:
        """Count a row; `example` as `example_text` has it."""
        if kind not in self._found:
            self._found[kind] = Finding(kind=kind, count=0, row=row, example=example)
        found = self._found[kind]
        self._found[kind] = replace(found, count=found.count + 1)

    def listed(self) -> tuple[Finding, ...]:
        """One finding per kind that occurred, in the order of `Kind`."""
        return tuple(self._found[kind] for kind in get_args(Kind) if kind in self._found)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of a dataset's rows."""

    source: str
    layout: str  # name of the column map
    num_rows: int
    num_problems: int
    num_demonstrations: int  # usable ones, before data.demonstration_fraction applies
    findings: tuple[Finding, ...]
    notice: str | None = None  # what else the user should know

    def lines(self) -> list[str]:
        head = (
            f"{self.source} ({self.layout}): {self.num_problems} problems from {self.num_rows} "
            f"rows, {self.num_demonstrations} with a demonstration"
        )
        notices = [] if self.notice is None else [f"  {self.notice}"]
        return [head, *(f"  {finding}" for finding in self.findings), *notices]

    def __str__(self) -> str:
        return "\n".join(self.lines())
