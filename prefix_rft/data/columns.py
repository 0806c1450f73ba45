"""Where a dataset's rows have the prompt, the answer and the demonstration; pure."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefix_rft.checks import UserError

Row = Mapping[str, Any]
Message = dict[str, str]  # role, content

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


def answer_text(value: Any) -> str | None:
    """A text or number as text; None if `value` is neither, is empty or is not finite."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
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


def _read_gsm8k(row: Row) -> Fields:
    worked = row.get("answer")
    if not isinstance(worked, str):
        return Fields(row.get("question"), None, None)
    _, marker, answer = worked.rpartition("####")
    has_number = bool(marker) and any(character.isdigit() for character in answer)
    return Fields(
        row.get("question"),
        answer_text(answer) if has_number else None,
        _calculator_note.sub("", worked),
    )


def read_named(prompt: str, answer: str, demonstration: str | None) -> Callable[[Row], Fields]:
    """A reader of columns by name; `a.b` is the field b of the struct column a."""

    def value(row: Row, path: str) -> Any:
        found: Any = row
        for name in (path,) if path in row else path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def read(row: Row) -> Fields:
        return Fields(
            value(row, prompt),
            answer_text(value(row, answer)),
            demonstration_text(value(row, demonstration)) if demonstration else None,
        )

    return read


# The first that fits is used, so the more specific ones come first.
KNOWN_MAPS = (
    ColumnMap(name="verl (OpenR1-46k, LUFFY)", needs=("prompt", "reward_model"), read=_read_verl),
    ColumnMap(
        name="OpenR1-Math-220k",
        needs=("problem", "answer", "generations", "correctness_math_verify"),
        read=_read_openr1,
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
    ColumnMap(name="GSM8K", needs=("question", "answer"), read=_read_gsm8k),
    ColumnMap(
        name="flat",
        needs=("prompt", "answer"),
        read=read_named("prompt", "answer", "demonstration"),
    ),
)


def find_map(
    found: Sequence[str], columns: Mapping[str, str], *, key: str, source: str = "data.path"
) -> ColumnMap:
    """The layout of a dataset with the columns `found`.

    Args:
        found: the dataset's column names.
        columns: columns of prompt, answer and optionally demonstration; empty: detect the layout.
        key: the configuration key of `columns`, for messages.
        source: the configuration key of the dataset and its value, for messages.

    Raises:
        DataError: a named column is missing, or no known layout fits.
    """
    if columns:
        missing = [c for c in columns.values() if c not in found and c.split(".")[0] not in found]
        if missing:
            raise DataError(
                f"{key}: no column {missing}; the dataset ({source}) has {sorted(found)}"
            )
        read = read_named(columns["prompt"], columns["answer"], columns.get("demonstration"))
        return ColumnMap(name=key, needs=tuple(columns.values()), read=read)
    for known in KNOWN_MAPS:
        if set(known.needs) <= set(found):
            return known
    layouts = "; ".join(f"{known.name}: {', '.join(known.needs)}" for known in KNOWN_MAPS)
    raise DataError(
        f"{source}: no known layout fits the columns {sorted(found)}; name them in {key}, "
        f"or use one of: {layouts}"
    )
