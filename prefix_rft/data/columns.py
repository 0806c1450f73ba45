"""Where a dataset's rows have the prompt, the answer and the demonstration; pure."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import datasets

from prefix_rft.checks import UserError
from prefix_rft.data.load_report import Kind

Row = Mapping[str, Any]
Message = dict[str, str]  # role, content

_MARKER = "####"  # GSM8K writes the answer behind it, at the end of the worked solution
_calculator_note = re.compile(r"<<[^<>]*>>")


class DataError(UserError):
    """A dataset cannot be used; the message says what was found and what was expected."""


class Fields(NamedTuple):
    """What is read from a row. None: the row does not have it."""

    prompt: Any  # text or list of messages, unchecked
    answer: str | None
    demonstration: str | None


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """A known layout; it fits a dataset that has all the columns in `needs`."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Fields]
    has_marker: bool = False  # fits only if most rows have the marker in the column `answer`

    @property
    def without_answer(self) -> Kind:
        """What the report calls a row without an answer."""
        return "no_marker" if self.has_marker else "no_answer"


def answer_text(value: Any) -> str | None:
    """A text or number as text; None if `value` is neither, is empty or is not finite."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float | Decimal):
        return str(value) if math.isfinite(value) else None
    return (value.strip() or None) if isinstance(value, str) else None


def demonstration_text(value: Any) -> str | None:
    """A text, or the content of the last assistant message in a list; None without one."""
    if isinstance(value, list | tuple):
        contents = [
            m.get("content")
            for m in value
            if isinstance(m, Mapping) and m.get("role") == "assistant"
        ]
        value = contents[-1] if contents else None
    return value if isinstance(value, str) and value else None


def _read_verl(row: Row) -> Fields:
    return Fields(
        row.get("prompt"),
        answer_text((row.get("reward_model") or {}).get("ground_truth")),
        demonstration_text(row.get("target")),
    )


def _read_openr1(row: Row) -> Fields:
    """The first complete generation that Math-Verify or, failing that, the judge found correct."""
    generations = row.get("generations") or ()
    complete = row.get("is_reasoning_complete") or [True] * len(generations)
    for verdicts in (row.get("correctness_math_verify"), row.get("correctness_llama")):
        for generation, is_correct, is_complete in zip(
            generations, verdicts or (), complete, strict=False
        ):
            if is_correct and is_complete and generation:
                return Fields(row.get("problem"), answer_text(row.get("answer")), generation)
    return Fields(row.get("problem"), answer_text(row.get("answer")), None)


def read_named(
    prompt: str, answer: str, demonstration: str | None, *, needs_marker: bool = False
) -> Callable[[Row], Fields]:
    """A reader of columns by name; `a.b` is the field b of the struct column a.

    An answer with the marker is a worked solution, and so a demonstration where no other is found.

    Args:
        needs_marker: an answer without it is none.
    """

    def value(row: Row, path: str) -> Any:
        found: Any = row
        for name in (path,) if path in row else path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def read(row: Row) -> Fields:
        asked, found = value(row, prompt), value(row, answer)
        worked = demonstration_text(value(row, demonstration)) if demonstration else None
        if not _is_marked(found):
            return Fields(asked, None if needs_marker else answer_text(found), worked)
        number = found.rpartition(_MARKER)[2]
        has_number = any(character.isdigit() for character in number)
        return Fields(
            asked,
            answer_text(number) if has_number else None,
            worked or _calculator_note.sub("", found),
        )

    return read


def _is_marked(answer: Any) -> bool:
    return isinstance(answer, str) and _MARKER in answer


# The first that fits is used, so the more specific ones come first.
KNOWN_MAPS = (
    ColumnMap(name="verl (OpenR1-46k, LUFFY)", needs=("prompt", "reward_model"), read=_read_verl),
    ColumnMap(
        name="OpenR1-Math-220k",
        needs=("problem", "answer", "generations", "correctness_math_verify"),
        read=_read_openr1,
    ),
    *(
        ColumnMap(
            name=name,
            needs=(prompt, "answer"),
            read=read_named(prompt, "answer", None, needs_marker=True),
            has_marker=True,
        )
        for name, prompt in (
            ("GSM8K", "question"),
            ("problem with worked answer", "problem"),
            ("prompt with worked answer", "prompt"),
        )
    ),
    ColumnMap(
        name="problem with messages",
        needs=("problem", "answer", "messages"),
        read=read_named("problem", "answer", "messages"),
    ),
    ColumnMap(
        name="problem with solution",
        needs=("problem", "answer", "solution"),
        read=read_named("problem", "answer", "solution"),
    ),
    ColumnMap(
        name="benchmark", needs=("problem", "answer"), read=read_named("problem", "answer", None)
    ),
    ColumnMap(
        name="question with answer",
        needs=("question", "answer"),
        read=read_named("question", "answer", "solution"),
    ),
    ColumnMap(
        name="flat",
        needs=("prompt", "answer"),
        read=read_named("prompt", "answer", "demonstration"),
    ),
)


def find_map(
    rows: datasets.Dataset | Sequence[Row],
    columns: Mapping[str, str],
    *,
    key: str,
    source: str = "data.path",
) -> ColumnMap:
    """The layout of a dataset, from its columns and from what is in its rows.

    Args:
        rows: at least one.
        columns: columns of prompt, answer and optionally demonstration; empty: detect the layout.
        key: the configuration key of `columns`, for messages.
        source: the configuration key of the dataset and its value, for messages.

    Raises:
        DataError: a named column is missing, or no known layout fits.
    """
    found = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0])
    if columns:
        missing = [c for c in columns.values() if c not in found and c.split(".")[0] not in found]
        if missing:
            raise DataError(
                f"{key}: no column {missing}; the dataset ({source}) has {sorted(found)}"
            )
        read = read_named(columns["prompt"], columns["answer"], columns.get("demonstration"))
        return ColumnMap(name=key, needs=tuple(columns.values()), read=read)
    for known in KNOWN_MAPS:
        if set(known.needs) <= set(found) and (not known.has_marker or _are_marked(rows)):
            return known
    by_columns = [known for known in KNOWN_MAPS if not known.has_marker]
    layouts = "; ".join(f"{known.name}: {', '.join(known.needs)}" for known in by_columns)
    raise DataError(
        f"{source}: no known layout fits the columns {sorted(found)}; name them in {key}, "
        f"or use one of: {layouts}"
    )


def _are_marked(rows: datasets.Dataset | Sequence[Row]) -> bool:
    """Whether most of the answers have the marker."""
    is_dataset = isinstance(rows, datasets.Dataset)
    answers = rows["answer"] if is_dataset else [row.get("answer") for row in rows]
    return sum(map(_is_marked, answers)) > len(rows) / 2
