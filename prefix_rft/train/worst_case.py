"""Made-up data that takes a step to its limits: longest rows, fullest micro-batches. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefix_rft.config import Config, make_method
from prefix_rft.data_types import MiniBatch, Problem, TrainRow
from prefix_rft.reward import Score

_NO_LIMIT = 1e30


class EveryOtherRight:
    """In the place of a `Rewarder`: right and wrong in turn, so that every group has a spread."""

    in_background = False

    def score(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[Score]:
        return [
            Score(reward=float(i % 2 == 0), status="wrong" if i % 2 else "correct")
            for i in range(len(completions))
        ]

    def has_answer(self, text: str) -> bool:
        return True


def worst_config(config: Config, num_ranks: int) -> Config:
    """`config` with fewer prompts a step: as many as reach its peaks of memory, and no check of
    what made-up data cannot pass.

    They fill the engine and two micro-batches of each rank, and where a step has several updates,
    two of them.
    """
    trainer, rollout = config.trainer, config.rollout
    rows_per_batch = 1 + trainer.micro_batch_tokens // _row_tokens(config)
    rows = num_ranks * max(rollout.max_batch_sequences, 2 * rows_per_batch)
    prompts = -(-rows // rows_per_prompt(config))
    most = trainer.prompts_per_step // trainer.prompts_per_update
    per_update = min(trainer.prompts_per_update, -(-prompts // min(2, most)))
    num_updates = min(most, max(min(2, most), -(-prompts // per_update)))
    return replace(
        config,
        trainer=replace(
            trainer, prompts_per_update=per_update, prompts_per_step=per_update * num_updates
        ),
        rollout=replace(
            rollout,
            mask_truncated=False,  # else nothing would be learnt from: all are cut
            max_log_prob_gap=None,
            max_sequence_mismatch=None if rollout.max_sequence_mismatch is None else _NO_LIMIT,
        ),
    )


def made_up_problems(
    config: Config, vocab_size: int, num_problems: int | None = None
) -> list[Problem]:
    """Problems, by default for a step, with the longest prompts and demonstrations."""

    def ids(length: int, start: int) -> tuple[int, ...]:
        return tuple((start + i) % vocab_size for i in range(length))

    return [
        Problem(
            index=index,
            prompt="",
            prompt_ids=ids(config.data.max_prompt_tokens, index),
            answer="0",
            demonstration="made up",
            demonstration_ids=ids(config.rollout.max_response_length - 1, index),
        )
        for index in range(num_problems or config.trainer.prompts_per_step)
    ]


def filled(mini_batch: MiniBatch, max_tokens: int, num_ranks: int) -> MiniBatch:
    """`mini_batch` with rows cut, or left out, so that micro-batches have exactly `max_tokens`.

    As it is where its rows are too long or too few for one, or fit already.
    """
    longest = max(map(num_fed, mini_batch.rows))
    full = [row for row in mini_batch.rows if num_fed(row) == longest]
    per_batch, rest = divmod(max_tokens, longest)
    if not per_batch or not rest:
        return mini_batch
    num_batches = len(full) // (per_batch + 1) // num_ranks * num_ranks
    if not num_batches:
        return mini_batch
    rows = full[: num_batches * (per_batch + 1)]
    cut_rows = [cut(row, rest) for row in rows[:num_batches]]
    return replace(mini_batch, rows=rows[num_batches:] + cut_rows)


def num_fed(row: TrainRow) -> int:
    """Tokens of a row in a batch."""
    return len(row.prompt_ids) + len(row.response_ids) - 1


def cut(row: TrainRow, num_tokens: int) -> TrainRow:
    """A row of which that many tokens are fed, as many of them as possible of its response."""
    left = num_response = min(len(row.response_ids), num_tokens)
    segments = []
    for segment in row.segments:
        kept = segment.token_ids[:left]
        log_probs = segment.rollout_log_probs[:left]
        segments.append(replace(segment, token_ids=kept, rollout_log_probs=log_probs))
        left -= len(kept)
    prompt_ids = row.prompt_ids[: num_tokens - num_response + 1]
    return replace(row, prompt_ids=prompt_ids, segments=tuple(segments))


def step_tokens(config: Config) -> int:
    """Tokens of all rows of a step at most."""
    return config.trainer.prompts_per_step * rows_per_prompt(config) * _row_tokens(config)


def rows_per_prompt(config: Config) -> int:
    """Rows that a problem has in a step: a group of rollouts or, without any, its demonstration."""
    method = make_method(config, eos_token_id=0)  # whatever ends a response
    [problem] = made_up_problems(config, 1, num_problems=1)
    return config.rollout.group_size if method.plan_group(problem, 0) else 1


def _row_tokens(config: Config) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_length - 1
