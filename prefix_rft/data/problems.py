"""Rows -> problems: what a run trains on and holds out, and the order of training."""

import os
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import require
from prefix_rft.config import MATH, Config, DataConfig
from prefix_rft.data.cache import prepared_once
from prefix_rft.data.columns import DataError, Row, find_map
from prefix_rft.data.generated import GENERATED, generated_rows
from prefix_rft.data.load_report import Finding, Findings, LoadReport, example_text
from prefix_rft.data.prepare import Recipe, prepare
from prefix_rft.data.prepared import PreparedRows, RowFacts, facts_of, facts_of_table
from prefix_rft.data.problem_list import Problems
from prefix_rft.data.sources import load_rows
from prefix_rft.data_types import Problem
from prefix_rft.model import vocabulary_size
from prefix_rft.reward import Grader, clean_answer, plain_number

_LEAST_BYTES = 4 * 2**20  # of the rows of a file: fewer are prepared at every start, in memory


class LoadedProblems(NamedTuple):
    """All problems of a run, with one report per source."""

    train: Problems
    held_out: Problems  # without demonstrations
    reports: list[LoadReport]


def load_problems(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, trains: bool = True
) -> LoadedProblems:
    """The training and the held-out problems of a run.

    Held out are at most `data.num_eval` problems of `data.eval_path`, evenly spaced. Without
    `data.eval_path` they are the last `data.num_eval` problems of `data.path`, or, where
    those are generated, as many that are generated separately.

    Args:
        trains: read the training problems; otherwise any number of rows can be held out.
    Raises:
        DataError: see `load_rows`, `problems_from_rows`, `split_held_out`.
        ConfigError: held-out rows do not have the column `eval.group_by`.
    """
    data = config.data

    def tokenized(rows: Iterable[Row], **options: Any) -> Problems:
        problems, report = problems_from_rows(
            rows,
            data,
            tokenizer,
            max_response_length=config.rollout.max_response_length,
            check_answers=MATH in config.reward.weights,
            **options,
        )
        reports.append(report)
        return problems

    reports: list[LoadReport] = []
    made_rows: list[Row] = []
    is_read = trains or (data.path not in GENERATED and data.eval_path is None)
    if data.path in GENERATED:
        rows, made_rows = generated_rows(config)
    elif is_read:
        rows = load_rows(data.path, data.split)
    train = tokenized(rows, source=data.path) if is_read else Problems.of([])
    if data.eval_path is not None:
        rows = load_rows(data.eval_path, data.eval_split, key="data.eval_path")
        held_out = tokenized(rows, source=data.eval_path, held_out=True)
        count = min(data.num_eval, len(held_out))
        held_out = held_out.take([i * len(held_out) // count for i in range(count)])
    elif made_rows:
        held_out = tokenized(made_rows, source=f"{data.path}, held out", held_out=True)
    else:
        if trains:
            train, held_out = split_held_out(train, data.num_eval)
        else:
            train, held_out = train[:0], train[-data.num_eval :]
        held_out = keep_demonstrations(held_out, 0.0, config.data_seed)
    _check_groups(held_out, config.eval.group_by)
    train = keep_demonstrations(train, data.demonstration_fraction, config.data_seed)
    return LoadedProblems(train, held_out, reports)


def problems_from_rows(
    rows: Iterable[Row],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_response_length: int,
    check_answers: bool = True,
    held_out: bool = False,
    source: str = "rows",
) -> tuple[Problems, LoadReport]:
    """Tokenised problems, in the order of the rows, and a report on the rows that were dropped.

    A prompt is rendered with the chat template and tokenised as is. The ids of a demonstration are
    those it has behind its prompt; of the thought that the template has begun or, empty, ended it
    has only the rest. No special tokens are added to either.

    Rows of a file that are more than a few are prepared once, and read from the cache of `datasets`
    by all processes and later starts; see `prepared_once`.

    Args:
        rows: a `datasets.Dataset`, or dicts that all have the keys of the first.
        config: the section `[data]`.
        tokenizer: must have a chat template.
        max_response_length: longest rollout in tokens; a demonstration must be shorter than that.
        check_answers: drop rows whose gold answer the math grader cannot parse.
        held_out: rows for evaluation: `eval_columns` applies, and demonstrations are not read.
        source: what the report and messages call the rows.

    Raises:
        DataError: no rows, unknown columns, no usable row, a tokenizer without a chat template, or,
            with `data.strict`, any finding.
    """
    rows = rows if isinstance(rows, datasets.Dataset) else list(rows)
    place = f"{'data.eval_path' if held_out else 'data.path'}: {source}"
    if len(rows) == 0:
        raise DataError(f"{place}: no rows")
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; set one in model.chat_template")
    key = "eval_columns" if held_out else "columns"
    layout = find_map(rows, getattr(config, key), key=f"data.{key}", source=place)

    recipe = Recipe(
        layout=layout,
        columns=getattr(config, key),
        tokenizer=tokenizer,
        system_prompt=config.system_prompt,
        held_out=held_out,
        max_prompt_tokens=config.max_prompt_tokens,
        max_demonstration_tokens=max_response_length - 1,
    )
    notice = None
    if isinstance(rows, datasets.Dataset) and rows.cache_files and rows.data.nbytes >= _LEAST_BYTES:

        def settle(table: datasets.Dataset) -> tuple[np.ndarray, tuple[Finding, ...]]:
            return _settled(facts_of_table(table), check_answers=check_answers)

        settled, notice = prepared_once(rows, recipe, settle, check_answers=check_answers)
        table, places, findings = settled
        problems = Problems(PreparedRows(table, rows), places)
    else:
        outcomes = list(prepare(rows, recipe, list(range(vocabulary_size(tokenizer)))))
        places, findings = _settled(map(facts_of, outcomes), check_answers=check_answers)
        problems = Problems.of([outcomes[place].problem for place in places])
    report = LoadReport(
        source=source,
        layout=layout.name,
        num_rows=len(rows),
        num_problems=len(problems),
        num_demonstrations=problems.num_demonstrations,
        findings=findings,
        notice=notice,
    )
    if not problems:
        raise DataError(f"{place}: no usable row\n{report}")
    if config.strict and not all(finding.is_note for finding in report.findings):
        raise DataError(f"refused because of data.strict\n{report}")
    return problems, report


def _check_groups(problems: Sequence[Problem], column: str | None) -> None:
    for problem in problems if column is not None else ():
        require(
            problem.columns.get(column) is not None,
            "eval.group_by",
            f"a column with a value in each held-out row, of {sorted(problem.columns)}",
            column,
        )


def keep_demonstrations(problems: Problems, fraction: float, seed: int) -> Problems:
    """`problems` with exactly `round(fraction * n)` of their n demonstrations, chosen by `seed`.

    Those kept at a smaller fraction are a subset of those kept at a larger one.
    """
    candidates = problems.has_demonstration.nonzero()[0].tolist()
    random.Random(seed).shuffle(candidates)
    keeps = np.ones(len(problems), dtype=bool)
    keeps[candidates[round(fraction * len(candidates)) :]] = False
    return problems.keep(keeps)


def split_held_out(problems: Problems, num_eval: int) -> tuple[Problems, Problems]:
    """All but the last `num_eval` problems, for training, and the last `num_eval`.

    Raises:
        DataError: no problem would be left for training.
    """
    if num_eval >= len(problems):
        raise DataError(
            f"data.num_eval: expected fewer than the {len(problems)} usable rows, got {num_eval}; "
            "or set data.eval_path for held-out problems"
        )
    return problems[:-num_eval], problems[-num_eval:]


def batch_indices(num_problems: int, prompts_per_step: int, step: int, seed: int) -> list[int]:
    """The problems that step `step` (from 0) trains on; pure, so the step is the data position.

    Every epoch has its own permutation, and batches continue across the end of one. A batch larger
    than the dataset contains some problems more than once.

    Raises:
        ValueError: a count is below 1, or `step` is negative.
    """
    for name, value, least in (
        ("num_problems", num_problems, 1),
        ("prompts_per_step", prompts_per_step, 1),
        ("step", step, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    positions = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    return [
        _epoch_order(num_problems, seed, position // num_problems)[position % num_problems]
        for position in positions
    ]


@lru_cache(maxsize=4)
def _epoch_order(num_problems: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_problems))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def _settled(
    facts: Iterable[RowFacts], *, check_answers: bool
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """The rows that are problems, and all findings: those of a row whose gold answer cannot be
    parsed do not count.
    """
    facts = list(facts)
    answers = [each.answer for each in facts if each.answer is not None]
    unparseable = _unparseable(answers) if check_answers else set()
    places, findings = [], Findings()
    for index, each in enumerate(facts):
        if each.answer in unparseable:
            findings.add("unparseable_answer", index, example_text(each.answer))
            continue
        for kind, example in zip(each.kinds, each.examples, strict=True):
            findings.add(kind, index, example)
        if each.is_kept:
            places.append(index)
    return np.array(places, dtype=np.int64), findings.listed()


def _unparseable(answers: Iterable[str]) -> set[str]:
    """Those of the gold answers that the math grader cannot parse."""
    golds = {answer: clean_answer(answer) for answer in answers}
    hard = [gold for gold in golds.values() if plain_number(gold) is None]
    if not hard:
        return set()
    # A process takes about half a second to start and parses a few hundred answers per second.
    num_workers = min(os.cpu_count() or 1, 1 + len(hard) // 200)
    with Grader(num_workers=num_workers, timeout_s=5.0, memory_mib=1024) as grader:
        parses = grader.parseable(list(golds.values()))
    return {answer for answer, is_parsed in zip(golds, parses, strict=True) if not is_parsed}
