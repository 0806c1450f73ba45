"""Datasets to problems; the testbed, and the small base model that is trained here."""

from prefix_rft.data.base_model import resolve_base, untrained_base
from prefix_rft.data.columns import demonstration_text
from prefix_rft.data.flat import FlatRows, begun_thought
from prefix_rft.data.load_report import LoadReport
from prefix_rft.data.prepare import tokenize_demonstrations
from prefix_rft.data.problem_list import Problems
from prefix_rft.data.problems import batch_indices, load_problems, problems_from_rows
from prefix_rft.data.sources import load_rows

__all__ = [
    "FlatRows",
    "LoadReport",
    "Problems",
    "batch_indices",
    "begun_thought",
    "demonstration_text",
    "load_problems",
    "load_rows",
    "problems_from_rows",
    "resolve_base",
    "tokenize_demonstrations",
    "untrained_base",
]
