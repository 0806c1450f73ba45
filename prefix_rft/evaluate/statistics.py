"""Graded answers to figures: greedy, avg@k, pass@k, with confidence intervals."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

from prefix_rft.evaluate.answers import Answers

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000  # of the bootstrap


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
        "truncated_frac": float(np.mean([each.truncated for each in answers])),
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
