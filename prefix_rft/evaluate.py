"""Accuracy of a policy on held-out problems: greedy, avg@k, pass@k, with confidence intervals."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

from prefix_rft.config import EvalConfig
from prefix_rft.data_types import Problem, RolloutRequest
from prefix_rft.reward import Rewarder
from prefix_rft.rollout import RolloutEngine

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000  # of the bootstrap


def evaluate(
    problems: Sequence[Problem],
    engine: RolloutEngine,
    rewarder: Rewarder,
    tokenizer,
    *,
    config: EvalConfig,
    max_response_length: int,
    seed: int,
) -> dict:
    """Greedy accuracy, and avg@k and pass@k of k = `config.num_samples` samples.

    Accuracies and shares are in [0, 1]; lengths in tokens; `<name>_ci95` is [low, high] of a
    bootstrap over problems.
    """
    k = config.num_samples
    limit = config.max_response_length or max_response_length
    requests = [RolloutRequest(prompt_ids=p.prompt_ids, max_new_tokens=limit) for p in problems]

    def run(copies: int, temperature: float) -> tuple[np.ndarray, list, Counter]:
        completions = engine.generate(
            [request for request in requests for _ in range(copies)],
            temperature=temperature,
            seed=seed,
            weights_version=engine.weights_version,
        )
        scores = rewarder.score(
            [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions],
            [problem for problem in problems for _ in range(copies)],
        )
        rewards = np.array([score.reward for score in scores]).reshape(len(problems), copies)
        return rewards, completions, Counter(score.status for score in scores)

    greedy, _, _ = run(1, 0.0)
    sampled, completions, statuses = run(k, config.temperature)
    num_correct = (sampled == 1.0).sum(axis=1)
    results = {
        "num_problems": len(problems),
        "greedy": float(greedy.mean()),
        "greedy_ci95": bootstrap_interval(greedy[:, 0]),
        f"avg@{k}": float(sampled.mean()),
        f"avg@{k}_ci95": bootstrap_interval(sampled.mean(axis=1)),
        f"pass@{k}": float(np.mean([pass_at_k(k, int(c), k) for c in num_correct])),
        "response_length_mean": float(np.mean([len(c.token_ids) for c in completions])),
        "truncated_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        "statuses": dict(statuses),
    }
    return results


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """Percentile interval of the mean of `values` [N], resampled over problems."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(x) for x in np.percentile(values[picks].mean(axis=1), [tail, 100 - tail])]
