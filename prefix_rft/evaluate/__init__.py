"""Accuracy of a policy on held-out problems."""

from prefix_rft.evaluate.answers import answer
from prefix_rft.evaluate.statistics import summarize

__all__ = [
    "answer",
    "summarize",
]
