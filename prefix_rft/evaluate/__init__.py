"""Accuracy of a policy on held-out problems."""

from prefix_rft.evaluate.answers import answer
from prefix_rft.evaluate.outcomes import write_outcomes
from prefix_rft.evaluate.statistics import CONFIDENCE, NUM_RESAMPLES, bootstrap_interval, summarize

__all__ = [
    "CONFIDENCE",
    "NUM_RESAMPLES",
    "answer",
    "bootstrap_interval",
    "summarize",
    "write_outcomes",
]
