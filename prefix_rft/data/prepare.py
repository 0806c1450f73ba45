"""A row to a problem: rendered, with one thought, tokenised, within the limits; pure."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from prefix_rft.data.columns import ColumnMap, DataError, Message, Row
from prefix_rft.data.load_report import Kind, example_text
from prefix_rft.data_types import Problem
from prefix_rft.reward import clean_answer

_TOKENIZER_BATCH = 256  # texts; the tokenizer needs some hundred bytes per token for a batch
# What a demonstration is tokenised behind where neither its prompt nor the last character of that
# keeps tokens of its own.
_OTHER_STARTS = ("\n", ":", "a")
open_thought = re.compile(r"<think>(\s*)\Z")  # at the end of a prompt
_empty_thought = re.compile(r"<think>\s*</think>(\s*)\Z")
_begun_thought = re.compile(r"\s*<think>")  # at the start of a demonstration


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides which problem a row becomes."""

    layout: ColumnMap
    columns: Mapping[str, str]  # those that the layout was asked to read; empty: none
    tokenizer: PreTrainedTokenizerBase  # has a chat template
    system_prompt: str | None
    held_out: bool  # demonstrations are not read
    max_prompt_tokens: int
    max_demonstration_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a row became, before its gold answer is checked."""

    answer: str | None = None  # None: the row has no prompt or no answer
    problem: Problem | None = None  # None: the row is left out
    notes: tuple[tuple[Kind, str], ...] = ()  # findings, with an example


def prepare(rows: Iterable[Row], recipe: Recipe, token_ids: Sequence[int]) -> Iterator[Outcome]:
    """One outcome per row, in their order.

    Args:
        token_ids: 0, 1, ... of the vocabulary, which all problems share: a dataset has many more
            tokens, and an int takes 28 bytes.
    Raises:
        DataError: the chat template refuses a prompt.
    """
    numbered = enumerate(rows)
    while batch := list(islice(numbered, _TOKENIZER_BATCH)):
        for outcome in prepare_batch(batch, recipe):
            yield _sharing(outcome, token_ids)


def _sharing(outcome: Outcome, token_ids: Sequence[int]) -> Outcome:
    if (problem := outcome.problem) is None:
        return outcome
    fields = ("prompt_ids", "demonstration_ids")
    ids = {name: tuple(map(token_ids.__getitem__, getattr(problem, name))) for name in fields}
    return dataclasses.replace(outcome, problem=dataclasses.replace(problem, **ids))


def prepare_batch(rows: Sequence[tuple[int, Row]], recipe: Recipe) -> list[Outcome]:
    """`prepare` for rows with their numbers, few enough to be tokenised together."""
    outcomes = [_draft(index, row, recipe) for index, row in rows]
    places = [place for place, outcome in enumerate(outcomes) if outcome.problem is not None]
    tokenized = _tokenized([outcomes[place] for place in places], recipe.tokenizer)
    for place, outcome in zip(places, tokenized, strict=True):
        outcomes[place] = _within_limits(outcome, recipe)
    return outcomes


def _draft(index: int, row: Row, recipe: Recipe) -> Outcome:
    """A row rendered but not tokenised."""
    layout = recipe.layout
    prompt, answer, demonstration = layout.read(row)
    messages = _messages(prompt, recipe.system_prompt)
    if messages is None:
        return Outcome(notes=(("no_prompt", example_text(prompt)),))
    if answer is None or not clean_answer(answer):
        return Outcome(notes=((layout.without_answer, example_text(row.get("answer", answer))),))
    problem = Problem(
        index=index,
        prompt=_render(messages, recipe.tokenizer, index),
        prompt_ids=(),
        answer=answer,
        demonstration=None if recipe.held_out else demonstration,
        columns=dict(row),
    )
    return Outcome(answer=answer, problem=problem)


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


def _tokenized(
    outcomes: Sequence[Outcome], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Outcome]:
    def ids_of(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def ids_elsewhere(prompt: str, demonstration: str) -> list[int]:
        for start in (prompt[-1], *_OTHER_STARTS):
            start_ids, whole = ids_of([start, start + demonstration])
            if (ids := _behind(start_ids, whole)) is not None:
                return ids
        return ids_of([demonstration])[0]

    outcomes = [_with_one_thought(outcome) for outcome in outcomes]
    drafts = [outcome.problem for outcome in outcomes]
    prompts = ids_of([draft.prompt for draft in drafts])
    wholes = iter(ids_of([draft.prompt + draft.demonstration for draft in drafts if _shows(draft)]))
    for outcome, draft, prompt_ids in zip(outcomes, drafts, prompts, strict=True):
        ids, notes = [], outcome.notes
        if _shows(draft):
            ids = _behind(prompt_ids, next(wholes))
        if ids is None:
            text = draft.prompt[-20:] + draft.demonstration[:20]
            notes = (*notes, ("merged_boundary", example_text(text)))
            ids = ids_elsewhere(draft.prompt, draft.demonstration)
        problem = dataclasses.replace(
            draft, prompt_ids=tuple(prompt_ids), demonstration_ids=tuple(ids)
        )
        yield dataclasses.replace(outcome, problem=problem, notes=notes)


def tokenize_demonstrations(
    prompts: Sequence[str], demonstrations: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """The ids that each demonstration has behind its prompt, as `prepare` takes them.

    Args:
        prompts: rendered; they may not be empty.
        demonstrations: None has no ids.
    """
    drafts = [
        Outcome(problem=Problem(index=i, prompt=prompt, prompt_ids=(), answer="", demonstration=it))
        for i, (prompt, it) in enumerate(zip(prompts, demonstrations, strict=True))
    ]
    ids: list[tuple[int, ...]] = []
    for start in range(0, len(drafts), _TOKENIZER_BATCH):
        part = _tokenized(drafts[start : start + _TOKENIZER_BATCH], tokenizer)
        ids += [outcome.problem.demonstration_ids for outcome in part]
    return ids


def _shows(draft: Problem) -> bool:
    return bool(draft.demonstration)


def _behind(start: list[int], whole: list[int]) -> list[int] | None:
    """What follows `start` in `whole`; None if `whole` starts otherwise."""
    return whole[len(start) :] if whole[: len(start)] == start else None


def _with_one_thought(outcome: Outcome) -> Outcome:
    """Without what the demonstration repeats of a thought at the end of its prompt."""
    draft, notes = outcome.problem, outcome.notes
    text = draft.demonstration
    if text is None:
        return outcome
    if thought := open_thought.search(draft.prompt):
        if begun := _begun_thought.match(text):
            text = _behind_space(thought[1], text[begun.end() :])
    elif thought := _empty_thought.search(draft.prompt):
        own, ends, rest = text.partition("</think>")
        if ends or _begun_thought.match(text):
            text = _behind_space(thought[1], rest)
            if own.replace("<think>", "").strip():
                notes = (*notes, ("left_out_thought", example_text(own)))
    problem = dataclasses.replace(draft, demonstration=text)
    return dataclasses.replace(outcome, problem=problem, notes=notes)


def _behind_space(space: str, text: str) -> str:
    """`text` without the white space at its start that is already there."""
    return text[len(space) :] if text.startswith(space) else text.lstrip()


def _within_limits(outcome: Outcome, recipe: Recipe) -> Outcome:
    """Without a problem whose prompt is long, or a demonstration that is too long or too short."""
    problem, kind = outcome.problem, None
    num_prompt, num_tokens = len(problem.prompt_ids), len(problem.demonstration_ids)
    if num_prompt > recipe.max_prompt_tokens:
        kind, num_tokens, problem = "long_prompt", num_prompt, None
    elif problem.demonstration is not None:
        if num_tokens < 2:
            kind = "short_demonstration"
        elif num_tokens > recipe.max_demonstration_tokens:
            kind = "long_demonstration"
        if kind is not None:
            problem = dataclasses.replace(problem, demonstration=None, demonstration_ids=())
    if kind is None:
        return outcome
    notes = (*outcome.notes, (kind, example_text(f"{num_tokens} tokens")))
    return dataclasses.replace(outcome, problem=problem, notes=notes)
