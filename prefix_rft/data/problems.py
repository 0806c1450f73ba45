"""Rows -> problems: dropping unusable rows, tokenising, and the order of training."""

import dataclasses
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import require
from prefix_rft.config import MATH, Config, DataConfig
from prefix_rft.data.columns import ColumnMap, DataError, Message, Row, find_map
from prefix_rft.data.generated import GENERATED, generated_rows
from prefix_rft.data.load_report import Findings, LoadReport
from prefix_rft.data.sources import load_rows
from prefix_rft.data_types import Problem
from prefix_rft.model import vocabulary_size
from prefix_rft.reward import Grader, clean_answer, plain_number

_TOKENIZER_BATCH = 256  # texts; the tokenizer needs some hundred bytes per token for a batch
# What a demonstration is tokenised behind where neither its prompt nor the last character of that
# keeps tokens of its own.
_OTHER_STARTS = ("\n", ":", "a")
open_thought = re.compile(r"<think>(\s*)\Z")  # at the end of a prompt
_empty_thought = re.compile(r"<think>\s*</think>(\s*)\Z")
_begun_thought = re.compile(r"\s*<think>")  # at the start of a demonstration


class LoadedProblems(NamedTuple):
    """All problems of a run, with one report per source."""

    train: list[Problem]
    held_out: list[Problem]  # without demonstrations
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

    def tokenized(rows: Iterable[Row], **options: Any) -> list[Problem]:
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
    train = tokenized(rows, source=data.path) if is_read else []
    if data.eval_path is not None:
        rows = load_rows(data.eval_path, data.eval_split, key="data.eval_path")
        held_out = tokenized(rows, source=data.eval_path, held_out=True)
        count = min(data.num_eval, len(held_out))
        held_out = [held_out[i * len(held_out) // count] for i in range(count)]
    elif made_rows:
        held_out = tokenized(made_rows, source=f"{data.path}, held out", held_out=True)
    else:
        if trains:
            train, held_out = split_held_out(train, data.num_eval)
        else:
            train, held_out = [], train[-data.num_eval :]
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
) -> tuple[list[Problem], LoadReport]:
    """Tokenised problems, in the order of the rows, and a report on the rows that were dropped.

    A prompt is rendered with the chat template and tokenised as is. The ids of a demonstration are
    those it has behind its prompt; of the thought that the template has begun or, empty, ended it
    has only the rest. No special tokens are added to either.

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

    findings = Findings()
    drafts = _drafts(rows, layout, tokenizer, config.system_prompt, findings)
    if held_out:
        drafts = [dataclasses.replace(draft, demonstration=None) for draft in drafts]
    if check_answers:
        drafts = _with_parseable_answer(drafts, findings)
    tokenized = _tokenized(drafts, tokenizer, findings)
    limits = config.max_prompt_tokens, max_response_length - 1
    problems = list(_within_limits(tokenized, *limits, findings))
    report = LoadReport(
        source=source,
        layout=layout.name,
        num_rows=len(rows),
        num_problems=len(problems),
        num_demonstrations=sum(bool(problem.demonstration_ids) for problem in problems),
        findings=findings.listed(),
    )
    if not problems:
        raise DataError(f"{place}: no usable row\n{report}")
    if config.strict and not all(finding.is_note for finding in report.findings):
        raise DataError(f"refused because of data.strict\n{report}")
    return problems, report


def _check_groups(problems: Sequence[Problem], column: str | None) -> None:
    for problem in problems:
        require(
            column is None or problem.columns.get(column) is not None,
            "eval.group_by",
            f"a column with a value in each held-out row, of {sorted(problem.columns)}",
            column,
        )


def keep_demonstrations(problems: Sequence[Problem], fraction: float, seed: int) -> list[Problem]:
    """`problems` with exactly `round(fraction * n)` of their n demonstrations, chosen by `seed`.

    Those kept at a smaller fraction are a subset of those kept at a larger one.
    """
    candidates = [i for i, problem in enumerate(problems) if problem.demonstration_ids]
    random.Random(seed).shuffle(candidates)
    removed = set(candidates[round(fraction * len(candidates)) :])
    return [
        dataclasses.replace(problem, demonstration=None, demonstration_ids=())
        if i in removed
        else problem
        for i, problem in enumerate(problems)
    ]


def split_held_out(
    problems: Sequence[Problem], num_eval: int
) -> tuple[list[Problem], list[Problem]]:
    """All but the last `num_eval` problems, for training, and the last `num_eval`.

    Raises:
        DataError: no problem would be left for training.
    """
    if num_eval >= len(problems):
        raise DataError(
            f"data.num_eval: expected fewer than the {len(problems)} usable rows, got {num_eval}; "
            "or set data.eval_path for held-out problems"
        )
    return list(problems[:-num_eval]), list(problems[-num_eval:])


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


def _drafts(
    rows: Iterable[Row],
    layout: ColumnMap,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    findings: Findings,
) -> list[Problem]:
    """The rows that have a prompt and an answer, rendered but not tokenised."""
    drafts = []
    for index, row in enumerate(rows):
        prompt, answer, demonstration = layout.read(row)
        messages = _messages(prompt, system_prompt)
        if messages is None:
            findings.add("no_prompt", index, prompt)
        elif answer is None or not clean_answer(answer):
            findings.add(layout.without_answer, index, row.get("answer", answer))
        else:
            drafts.append(
                Problem(
                    index=index,
                    prompt=_render(messages, tokenizer, index),
                    prompt_ids=(),
                    answer=answer,
                    demonstration=demonstration,
                    columns=dict(row),
                )
            )
    return drafts


def _messages(prompt: Any, system_prompt: str | None) -> list[Message] | None:
    """The conversation of a prompt, a text or a list of messages; None if it is not usable."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple) or not prompt:
        return None
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping):
            return None
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        return None
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, row: int) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise DataError(
            f"row {row}: the chat template refuses messages of {roles}: {error}"
        ) from error


def _with_parseable_answer(drafts: list[Problem], findings: Findings) -> list[Problem]:
    golds = {draft.answer: clean_answer(draft.answer) for draft in drafts}
    hard = [gold for gold in golds.values() if plain_number(gold) is None]
    if not hard:
        return drafts
    # A process takes about half a second to start and parses a few hundred answers per second.
    num_workers = min(os.cpu_count() or 1, 1 + len(hard) // 200)
    with Grader(num_workers=num_workers, timeout_s=5.0, memory_mib=1024) as grader:
        parses = dict(zip(golds, grader.parseable(list(golds.values())), strict=True))
    for draft in drafts:
        if not parses[draft.answer]:
            findings.add("unparseable_answer", draft.index, draft.answer)
    return [draft for draft in drafts if parses[draft.answer]]


def _tokenized(
    drafts: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> Iterator[Problem]:
    # One int object per token id: a dataset has hundreds of millions of tokens.
    shared = list(range(vocabulary_size(tokenizer)))

    def ids_of(texts: list[str]) -> list[tuple[int, ...]]:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [tuple(map(shared.__getitem__, ids)) for ids in encoded["input_ids"]]

    def ids_elsewhere(prompt: str, demonstration: str) -> tuple[int, ...]:
        for start in (prompt[-1], *_OTHER_STARTS):
            start_ids, whole = ids_of([start, start + demonstration])
            if (ids := _behind(start_ids, whole)) is not None:
                return ids
        return ids_of([demonstration])[0]

    for start in range(0, len(drafts), _TOKENIZER_BATCH):
        batch = [_with_one_thought(d, findings) for d in drafts[start : start + _TOKENIZER_BATCH]]
        prompts = ids_of([draft.prompt for draft in batch])
        wholes = ids_of([draft.prompt + (draft.demonstration or "") for draft in batch])
        for draft, prompt_ids, whole in zip(batch, prompts, wholes, strict=True):
            ids = _behind(prompt_ids, whole)
            if ids is None:
                text = draft.prompt[-20:] + draft.demonstration[:20]
                findings.add("merged_boundary", draft.index, text)
                ids = ids_elsewhere(draft.prompt, draft.demonstration)
            yield dataclasses.replace(draft, prompt_ids=prompt_ids, demonstration_ids=ids)


def tokenize_demonstrations(
    prompts: Sequence[str], demonstrations: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """The ids that each demonstration has behind its prompt, as `problems_from_rows` takes them.

    Args:
        prompts: rendered; they may not be empty.
        demonstrations: None has no ids.
    """
    drafts = [
        Problem(index=i, prompt=prompt, prompt_ids=(), answer="", demonstration=text)
        for i, (prompt, text) in enumerate(zip(prompts, demonstrations, strict=True))
    ]
    return [draft.demonstration_ids for draft in _tokenized(drafts, tokenizer, Findings())]


def _behind(start: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...] | None:
    """What follows `start` in `whole`; None if `whole` starts otherwise."""
    return whole[len(start) :] if whole[: len(start)] == start else None


def _with_one_thought(draft: Problem, findings: Findings) -> Problem:
    """`draft` without what its demonstration repeats of a thought at the end of its prompt."""
    text = draft.demonstration
    if text is None:
        return draft
    if thought := open_thought.search(draft.prompt):
        if begun := _begun_thought.match(text):
            text = _behind_space(thought[1], text[begun.end() :])
    elif thought := _empty_thought.search(draft.prompt):
        own, ends, rest = text.partition("</think>")
        if ends or _begun_thought.match(text):
            text = _behind_space(thought[1], rest)
            if own.replace("<think>", "").strip():
                findings.add("left_out_thought", draft.index, own)
    return dataclasses.replace(draft, demonstration=text)


def _behind_space(space: str, text: str) -> str:
    """`text` without the white space at its start that is already there."""
    return text[len(space) :] if text.startswith(space) else text.lstrip()


def _within_limits(
    problems: Iterable[Problem],
    max_prompt_tokens: int,
    max_demonstration_tokens: int,
    findings: Findings,
) -> Iterator[Problem]:
    """Drop problems with a long prompt, and demonstrations that are too long or too short."""
    for problem in problems:
        num_tokens = len(problem.demonstration_ids)
        if len(problem.prompt_ids) > max_prompt_tokens:
            findings.add("long_prompt", problem.index, f"{len(problem.prompt_ids)} tokens")
            continue
        if problem.demonstration is not None and not 2 <= num_tokens <= max_demonstration_tokens:
            kind = "short_demonstration" if num_tokens < 2 else "long_demonstration"
            findings.add(kind, problem.index, f"{num_tokens} tokens")
            problem = dataclasses.replace(problem, demonstration=None, demonstration_ids=())
        yield problem
