"""Held-out problems to graded answers: one greedy, k sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefix_rft.config import EvalConfig
from prefix_rft.data_types import Completion, Problem, RolloutRequest
from prefix_rft.reward import Rewarder, Score, response_text
from prefix_rft.rollout import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the policy answered to one problem."""

    greedy: Score
    scores: tuple[Score, ...]  # for the k samples, as in the following fields
    lengths: tuple[int, ...]  # tokens
    truncated: tuple[bool, ...]
    group: str | None = None  # the problem's value of the column `eval.group_by`


def answer(
    problems: Sequence[Problem],
    engine: RolloutEngine,
    rewarder: Rewarder,
    tokenizer,
    *,
    config: EvalConfig,
    max_response_length: int,
    seed: int,
) -> list[Answers]:
    """One greedy answer and k = `config.num_samples` sampled ones to each of `problems`, scored.

    Where `config.group_by` is given, all problems must have that column.
    """
    k = config.num_samples
    limit = config.max_response_length or max_response_length
    requests = [RolloutRequest(prompt_ids=p.prompt_ids, max_new_tokens=limit) for p in problems]

    def run(copies: int, temperature: float) -> tuple[list[Completion], list[Score]]:
        completions = engine.generate(
            [request for request in requests for _ in range(copies)],
            temperature=temperature,
            seed=seed,
            weights_version=engine.weights_version,
        )
        texts = [response_text(tokenizer, completion) for completion in completions]
        return completions, rewarder.score(texts, [p for p in problems for _ in range(copies)])

    _, greedy = run(1, 0.0)
    completions, scores = run(k, config.temperature)
    spans = [slice(i * k, (i + 1) * k) for i in range(len(problems))]
    return [
        Answers(
            greedy=best,
            scores=tuple(scores[span]),
            lengths=tuple(len(c.token_ids) for c in completions[span]),
            truncated=tuple(c.finish_reason == "length" for c in completions[span]),
            group=None if config.group_by is None else str(problem.columns[config.group_by]),
        )
        for problem, best, span in zip(problems, greedy, spans, strict=True)
    ]
