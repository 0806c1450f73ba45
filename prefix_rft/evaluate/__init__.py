"""Accuracy of a policy on held-out problems and on benchmarks."""

from prefix_rft.evaluate.answers import answer
from prefix_rft.evaluate.demonstrations import DemonstrateOptions, demonstrate
from prefix_rft.evaluate.in_training import TrainingSuites, selection_metric, training_suites
from prefix_rft.evaluate.outcomes import write_outcomes
from prefix_rft.evaluate.statistics import CONFIDENCE, NUM_RESAMPLES, bootstrap_interval, summarize
from prefix_rft.evaluate.suite_command import run_suites
from prefix_rft.evaluate.suites import SuiteOptions, suite_list

__all__ = [
    "CONFIDENCE",
    "NUM_RESAMPLES",
    "DemonstrateOptions",
    "SuiteOptions",
    "TrainingSuites",
    "answer",
    "bootstrap_interval",
    "demonstrate",
    "run_suites",
    "selection_metric",
    "suite_list",
    "summarize",
    "training_suites",
    "write_outcomes",
]
