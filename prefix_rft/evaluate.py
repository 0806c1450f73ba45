"""Accuracy of a policy on held-out problems: greedy, avg@k, pass@k, with confidence intervals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from prefix_rft.config import EvalConfig
from prefix_rft.data_types import Completion, Problem, RewardStatus, RolloutRequest
from prefix_rft.reward import Rewarder, Score
from prefix_rft.rollout import RolloutEngine

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the policy answered to one problem."""

    greedy_reward: float
    rewards: tuple[float, ...]  # of the k samples, as are the following
    lengths: tuple[int, ...]  # tokens
    truncated: tuple[bool, ...]
    statuses: tuple[RewardStatus, ...]


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
    """One greedy answer and k = `config.num_samples` sampled ones to each of `problems`, scored."""
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
        texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        return completions, rewarder.score(texts, [p for p in problems for _ in range(copies)])

    _, greedy = run(1, 0.0)
    completions, scores = run(k, config.temperature)
    spans = [slice(i * k, (i + 1) * k) for i in range(len(problems))]
    return [
        Answers(
            greedy_reward=best.reward,
            rewards=tuple(score.reward for score in scores[span]),
            lengths=tuple(len(c.token_ids) for c in completions[span]),
            truncated=tuple(c.finish_reason == "length" for c in completions[span]),
            statuses=tuple(score.status for score in scores[span]),
        )
        for best, span in zip(greedy, spans, strict=True)
    ]


def summarize(answers: Sequence[Answers]) -> dict:
    """Greedy accuracy, avg@k and pass@k over problems.

    Accuracies and shares are in [0, 1]; lengths in tokens; `<name>_ci95` is [low, high] of a
    bootstrap over problems.
    """
    greedy = np.array([each.greedy_reward for each in answers])
    sampled = np.array([each.rewards for each in answers])
    k = sampled.shape[1]
    num_correct = (sampled == 1.0).sum(axis=1)
    return {
        "num_problems": len(answers),
        "greedy": float(greedy.mean()),
        "greedy_ci95": bootstrap_interval(greedy),
        f"avg@{k}": float(sampled.mean()),
        f"avg@{k}_ci95": bootstrap_interval(sampled.mean(axis=1)),
        f"pass@{k}": float(np.mean([pass_at_k(k, int(c), k) for c in num_correct])),
        "response_length_mean": float(np.mean([each.lengths for each in answers])),
        "truncated_share": float(np.mean([each.truncated for each in answers])),
        "statuses": dict(Counter(status for each in answers for status in each.statuses)),
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """Percentile interval of the mean of `values` [N], resampled over problems."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(x) for x in np.percentile(values[picks].mean(axis=1), [tail, 100 - tail])]
