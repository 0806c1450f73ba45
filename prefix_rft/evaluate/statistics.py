"""Graded answers to figures: greedy, avg@k, pass@k, with confidence intervals."""

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import NamedTuple, Self

import numpy as np

from prefix_rft.evaluate.answers import Answers
from prefix_rft.reward import RewardError, Score

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000  # drawn by the bootstrap


def summarize(answers: Sequence[Answers]) -> dict:
    """Greedy accuracy, avg@k and pass@k over problems: fractions of `correct` answers.

    Fractions are in [0, 1]; lengths in tokens; `<name>_ci95` is [low, high] of a bootstrap over
    problems. Rewards that say more than correct or not have their own mean, of the k samples.
    Answers without a reward are left out. Where answers have a group, `num_problems/<group>`,
    `greedy/<group>` and `avg@k/<group>` follow for each, in the order of their first answers.

    Raises:
        RewardError: no greedy answer has a reward, or no sampled one.
    """
    k = len(answers[0].scores)
    results = _accuracies(answers)
    if not {"greedy", f"avg@{k}"} <= results.keys():
        raise RewardError(f"no reward for any answer to {len(answers)} held-out problems")
    sampled = [outcomes for each in answers if (outcomes := _outcomes(each.scores))]
    results |= {
        f"pass@{k}": float(np.mean([pass_at_k(len(x), sum(x), len(x)) for x in sampled])),
        "response_length_mean": float(np.mean([each.lengths for each in answers])),
        "truncated_frac": float(np.mean([each.truncated for each in answers])),
        "statuses": dict(Counter(score.status for each in answers for score in each.scores)),
    }
    scores = [score for each in answers for score in each.scores]
    rewards = [score.reward for score in scores if score.reward is not None]
    if not {0.0, 1.0}.issuperset(rewards):
        results["reward_mean"] = float(np.mean(rewards))
    for group in dict.fromkeys(each.group for each in answers if each.group is not None):
        results |= _accuracies([each for each in answers if each.group == group], f"/{group}")
    return results


def _accuracies(answers: Sequence[Answers], suffix: str = "") -> dict:
    """Number of problems, greedy accuracy and avg@k with their intervals, where rewards give them.

    `suffix` ends the names, before `_ci95`.
    """
    results: dict = {f"num_problems{suffix}": len(answers)}
    greedy = [is_correct for each in answers for is_correct in _outcomes([each.greedy])]
    sampled = [np.mean(outcomes) for each in answers if (outcomes := _outcomes(each.scores))]
    for name, values in (("greedy", greedy), (f"avg@{len(answers[0].scores)}", sampled)):
        if values:
            results[f"{name}{suffix}"] = float(np.mean(values))
            results[f"{name}{suffix}_ci95"] = bootstrap_interval(np.array(values))
    return results


def _outcomes(scores: Sequence[Score]) -> list[bool]:
    """Whether each answer with a reward is correct."""
    return [score.status == "correct" for score in scores if score.reward is not None]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


class Estimate(NamedTuple):
    """A mean over problems, with its standard error and the 95% interval of a bootstrap."""

    value: float
    stderr: float  # 0 for one problem
    ci95: list[float]

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Of a value a problem, [N]."""
        return cls.of_suites([values])

    @classmethod
    def of_suites(cls, suites: Sequence[np.ndarray]) -> Self:
        """The mean of the means of several sets of problems, each resampled by itself."""
        variances = [
            values.var(ddof=1) / len(values) if len(values) > 1 else 0 for values in suites
        ]
        return cls(
            float(np.mean([values.mean() for values in suites])),
            float(np.sqrt(sum(variances)) / len(suites)),
            _interval(sum(map(_resampled_means, suites)) / len(suites)),
        )


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """Percentile interval of the mean of `values` [N], resampled over problems."""
    return _interval(_resampled_means(values))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
    return values[picks].mean(axis=1)


def _interval(means: np.ndarray) -> list[float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(x) for x in np.percentile(means, [tail, 100 - tail])]
