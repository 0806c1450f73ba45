"""Prepared rows as Arrow tables: what `prepare` makes of a row, in a file that is memory-mapped."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefix_rft.data.columns import Row
from prefix_rft.data.load_report import Kind
from prefix_rft.data.prepare import Outcome, Recipe, prepare_batch
from prefix_rft.data.problem_list import DIGEST_BYTES, problem_digest, without_demonstration
from prefix_rft.data_types import Problem

_BATCH = 64  # rows; that many long demonstrations are some ten MiB of ids
_SKIM = 1024  # rows whose texts are read together
_ROWS_PER_PROCESS = 256  # fewer are tokenised sooner than a process has started
_DIGESTS = {True: "digest", False: "bare_digest"}  # with the demonstration, and without
_SCHEMA = pa.schema(
    {
        "answer": pa.string(),
        "is_kept": pa.bool_(),
        "kinds": pa.list_(pa.string()),
        "examples": pa.list_(pa.string()),
        "prompt": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "demonstration": pa.string(),
        "demonstration_ids": pa.list_(pa.int32()),
        "digest": pa.binary(),
        "bare_digest": pa.binary(),
    }
)


def prepare_table(
    rows: datasets.Dataset, recipe: Recipe, fingerprint: str, file: str | None
) -> datasets.Dataset:
    """One prepared row per row, in their order.

    Args:
        file: its name and, of several processes, a number before the suffix name what is written;
            None: kept in memory, and made by this process alone.
    Raises:
        DataError: the chat template refuses a prompt.
        OSError: a file cannot be written.
    """
    num_processes = min(len(os.sched_getaffinity(0)), len(rows) // _ROWS_PER_PROCESS)
    return rows.map(
        _prepare_columns,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        fn_kwargs={"recipe": recipe},
        num_proc=num_processes if file is not None and num_processes > 1 else None,
        remove_columns=rows.column_names,
        features=datasets.Features.from_arrow_schema(_SCHEMA),
        keep_in_memory=file is None,
        cache_file_name=file,
        load_from_cache_file=False,
        writer_batch_size=_BATCH,
        new_fingerprint=fingerprint,
        desc="preparing problems",
    )


def _prepare_columns(
    columns: Mapping[str, Sequence[Any]], indices: Sequence[int], recipe: Recipe
) -> pa.Table:
    names = list(columns)
    values = zip(*(columns[name] for name in names), strict=True)
    rows = [dict(zip(names, row, strict=True)) for row in values]
    return _table(prepare_batch(list(zip(indices, rows, strict=True)), recipe))


def _table(outcomes: Sequence[Outcome]) -> pa.Table:
    problems = [outcome.problem for outcome in outcomes]
    facts = zip(*map(facts_of, outcomes), strict=True)
    columns = dict(zip(RowFacts._fields, facts, strict=True)) | {
        "prompt": [problem and problem.prompt for problem in problems],
        "demonstration": [problem and problem.demonstration for problem in problems],
        "digest": [problem and problem_digest(problem) for problem in problems],
        "bare_digest": [
            problem and problem_digest(without_demonstration(problem)) for problem in problems
        ],
    }
    arrays = {name: pa.array(values, _SCHEMA.field(name).type) for name, values in columns.items()}
    for name in ("prompt_ids", "demonstration_ids"):
        arrays[name] = _ids_array([getattr(problem, name, ()) for problem in problems])
    return pa.table([arrays[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _ids_array(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    values = np.concatenate([np.array(ids, dtype=np.int32) for ids in rows])
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


class RowFacts(NamedTuple):
    """What decides whether a row is a problem, and what is told of it."""

    answer: str | None
    is_kept: bool
    kinds: Sequence[Kind]
    examples: Sequence[str]


def facts_of(outcome: Outcome) -> RowFacts:
    return RowFacts(
        outcome.answer,
        outcome.problem is not None,
        [kind for kind, _ in outcome.notes],
        [example for _, example in outcome.notes],
    )


def facts_of_table(table: datasets.Dataset) -> Iterator[RowFacts]:
    """`facts_of` the outcome of every row."""
    for batch in table.data.select(list(RowFacts._fields)).to_batches():
        yield from map(RowFacts, *(column.to_pylist() for column in batch.columns))


class PreparedRows:
    """A store of problems: prepared rows, and the rows that they were made of.

    Args:
        table: as `prepare_table` makes it.
        rows: of the source, as many.
    """

    def __init__(self, table: datasets.Dataset, rows: datasets.Dataset) -> None:
        self._table, self._rows = table, rows
        columns = table.data.select(["demonstration_ids", *_DIGESTS.values()])
        lengths = pc.list_value_length(columns.column("demonstration_ids"))
        self.has_demonstration = lengths.to_numpy() > 0
        self._digests = {
            kept: _fixed_width(columns.column(name)) for kept, name in _DIGESTS.items()
        }

    def read(self, place: int) -> Problem:
        row = self._table[place]
        return Problem(
            index=place,
            prompt=row["prompt"],
            prompt_ids=tuple(row["prompt_ids"]),
            answer=row["answer"],
            demonstration=row["demonstration"],
            demonstration_ids=tuple(row["demonstration_ids"]),
            columns=dict(self._rows[place]),
        )

    def skim(self, places: np.ndarray) -> Iterator[Problem]:
        for start in range(0, len(places), _SKIM):
            part = places[start : start + _SKIM]
            block = self._table.data.fast_slice(part[0], part[-1] - part[0] + 1)
            texts = {
                name: block.column(name).to_pylist()
                for name in ("prompt", "answer", "demonstration")
            }
            lengths = {
                name: pc.list_value_length(block.column(name)).to_pylist()
                for name in ("prompt_ids", "demonstration_ids")
            }
            for place in part.tolist():
                at = place - int(part[0])
                ids = {name: _Ids(self, name, place, each[at]) for name, each in lengths.items()}
                own = {name: each[at] for name, each in texts.items()}
                yield Problem(index=place, columns=_Columns(self._rows, place), **own, **ids)

    def ids(self, name: str, place: int) -> tuple[int, ...]:
        [ids] = self._table.data.fast_slice(place, 1).column(name).to_pylist()
        return tuple(ids)

    def digests(self, places: np.ndarray, keeps: np.ndarray) -> Iterator[bytes]:
        chosen = np.where(keeps[:, None], self._digests[True][places], self._digests[False][places])
        return iter([chosen.tobytes()])


def _fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """[N, DIGEST_BYTES] uint8; zeros where a row has none."""
    blank = bytes(DIGEST_BYTES)
    joined = b"".join(value or blank for value in column.to_pylist())
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


@dataclasses.dataclass(frozen=True, eq=False)
class _Ids(Sequence[int]):
    """Ids whose number is known and which are read when one of them is asked for."""

    store: PreparedRows
    name: str
    place: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.store.ids(self.name, self.place)[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return self[:] == (other[:] if isinstance(other, _Ids) else other)

    def __hash__(self) -> int:
        return hash(self[:])

    def __add__(self, other: tuple[int, ...]) -> tuple[int, ...]:
        return self[:] + tuple(other)

    def __radd__(self, other: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(other) + self[:]


@dataclasses.dataclass(frozen=True)
class _Columns(Mapping[str, Any]):
    """A row of the source that is read when one of its columns is asked for."""

    rows: datasets.Dataset
    place: int

    def __getitem__(self, name: str) -> Any:
        return self._row()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.column_names)

    def __len__(self) -> int:
        return len(self.rows.column_names)

    def _row(self) -> Row:
        return self.rows[self.place]
