"""Accuracy of a policy on held-out problems and on benchmarks."""

from prefix_rft.evaluate.answers import answer
from prefix_rft.evaluate.outcomes import write_outcomes
from prefix_rft.evaluate.statistics import CONFIDENCE, NUM_RESAMPLES, bootstrap_interval, summarize
from prefix_rft.evaluate.suite_command import run_suites
from prefix_rft.evaluate.suites import SuiteOptions, suite_list

__all__ = [
    "CONFIDENCE",
    "NUM_RESAMPLES",
    "SuiteOptions",
    "answer",
    "bootstrap_interval",
    "run_suites",
    "suite_list",
    "summarize",
    "write_outcomes",
]
