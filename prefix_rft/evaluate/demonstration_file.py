"""The file of a teacher's demonstrations: its rows, its counts, and how it is written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config
from prefix_rft.data import FlatRows, begun_thought, problems_from_rows
from prefix_rft.data_types import Problem
from prefix_rft.evaluate.chunks import Sample
from prefix_rft.reward import grader_info

_METADATA = b"prefix_rft.demonstrate"  # key of what a file follows from, and its counts
_ANY_LENGTH = 2**31


@dataclass(frozen=True, kw_only=True)
class TeacherSample(Sample):
    """A graded response, with what it takes to be a demonstration."""

    response_ids: Sequence[int]  # without the end of the turn

    @property
    def can_demonstrate(self) -> bool:
        """Correct, ended by the teacher itself, and long enough to be cut."""
        is_whole = self.finish_reason == "stop" and len(self.response_ids) >= 2
        return self.status == "correct" and is_whole


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What came of the problems."""

    num_problems: int  # to train on
    num_unasked: int  # of them, whose prompts fill the teacher's positions
    num_held_out: int  # further problems, at the end of the file, which were not asked
    num_solved: int
    num_kept: int  # demonstrations
    mean_tokens: float  # of a demonstration
    num_unfit: int  # correct responses that are cut at the limit, or of a single token
    num_truncated: int  # responses
    statuses: dict[str, int]  # of responses
    num_other_ids: int  # demonstrations that, read from the file, are not the ids sampled

    def lines(self) -> list[str]:
        asked = self.num_problems - self.num_unasked
        share = 100 * self.num_solved / max(1, asked)
        statuses = ", ".join(f"{count} {name}" for name, count in self.statuses.items())
        told = [
            f"{self.num_solved} of {asked} problems solved ({share:.1f}%), {self.num_kept} "
            f"demonstrations kept, of {self.mean_tokens:.1f} tokens on average",
            f"responses: {statuses}; {self.num_truncated} cut at the limit; {self.num_unfit} "
            "correct ones are no demonstrations (cut, or a single token)",
            f"{self.num_other_ids} of {self.num_kept} demonstrations have other token ids than the "
            "teacher sampled, once their text is tokenised again",
        ]
        if self.num_unasked:
            told.append(f"{self.num_unasked} problems not asked: the teacher has no room for them")
        if self.num_held_out:
            told.append(
                f"{self.num_held_out} held-out problems not asked; they end the file, where the "
                "same data.num_eval holds them out again"
            )
        return told


class Made:
    """The rows of the file, and how they came about.

    Args:
        problems: those to train on, in their order.
        held_out: problems that end the file, without a demonstration.
        samples: those of a problem one after the other.
        keep: which of a problem's correct samples: shortest, first or all.
        only_solved: no row for a problem without a demonstration.
    """

    def __init__(
        self,
        flat: FlatRows,
        problems: Sequence[Problem],
        held_out: Sequence[Problem],
        samples: Iterable[TeacherSample],
        *,
        keep: str,
        only_solved: bool,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ids: dict[int, tuple[int, ...]] = {}  # by row, those that the teacher sampled
        self.problems = problems
        self.num_held_out = len(held_out)
        self.num_solved = self.num_unfit = self.num_truncated = 0
        self.statuses: Counter[str] = Counter()
        kept = {}
        for index, responses in groupby(samples, key=lambda sample: sample.index):
            kept[index] = self._kept(list(responses), keep)
        for problem in problems:
            chosen = kept.get(problem.index, [])
            for sample in chosen:
                self.ids[len(self.rows)] = tuple(sample.response_ids)
                text = begun_thought(problem.prompt) + sample.response
                self.rows.append(flat.row(problem, text))
            if not chosen and not only_solved:
                self.rows.append(flat.row(problem, None))
        self.rows += [flat.row(problem, None) for problem in held_out]

    def _kept(self, responses: Sequence[TeacherSample], keep: str) -> list[TeacherSample]:
        self.statuses.update(sample.status for sample in responses)
        correct = [sample for sample in responses if sample.status == "correct"]
        fit = [sample for sample in correct if sample.can_demonstrate]
        self.num_solved += bool(correct)
        self.num_unfit += len(correct) - len(fit)
        self.num_truncated += sum(sample.finish_reason == "length" for sample in responses)
        if keep == "shortest":
            fit.sort(key=lambda sample: len(sample.response_ids))
        return fit if keep == "all" else fit[:1]

    def counts(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, *, num_unasked: int
    ) -> Counts:
        """What came of the problems; the rows are read as a run reads them."""
        other_ids = 0
        if self.ids:
            data = replace(config.data, columns={}, eval_columns={}, strict=False)
            found, _ = problems_from_rows(
                self.rows, data, tokenizer, max_response_length=_ANY_LENGTH, check_answers=False
            )
            read = {problem.index: problem.demonstration_ids for problem in found}
            other_ids = sum(read.get(row) != ids for row, ids in self.ids.items())
        return Counts(
            num_problems=len(self.problems),
            num_unasked=num_unasked,
            num_held_out=self.num_held_out,
            num_solved=self.num_solved,
            num_kept=len(self.ids),
            mean_tokens=sum(map(len, self.ids.values())) / max(1, len(self.ids)),
            num_unfit=self.num_unfit,
            num_truncated=self.num_truncated,
            statuses=dict(sorted(self.statuses.items())),
            num_other_ids=other_ids,
        )


def finished(out: Path, identity: dict[str, Any]) -> Counts | None:
    """The counts of the file that is there already; None if there is none.

    Raises:
        ConfigError: it is another.
    """
    if not out.exists():
        return None
    try:
        metadata = pq.read_schema(out).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"--out: {out} is there and cannot be read: {error}") from None
    if _METADATA not in metadata:
        raise ConfigError(f"--out: {out} is there, and not made by demonstrate: choose another")
    header = json.loads(metadata[_METADATA])
    before, now = header["identity"], json.loads(json.dumps(identity))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"--out: {out} is made with {key} {before.get(key)!r}, got {now.get(key)!r}: "
                "choose another file, or delete it"
            )
    return Counts(**header["counts"])


def write(
    out: Path, rows: Sequence[dict[str, Any]], identity: dict[str, Any], counts: Counts
) -> None:
    """Write a file that is there whole or not at all, with what it follows from in its metadata."""
    header = {"identity": identity, "counts": asdict(counts), "grader": grader_info()}
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({_METADATA: json.dumps(header)})
    partial = out.with_name(f".partial-{os.getpid()}-{out.name}")
    with partial.open("wb") as stream:
        pq.write_table(table, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, out)
