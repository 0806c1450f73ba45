"""Engines that generate completions; one is loaded when it is asked for."""

from prefix_rft.rollout.engine import EngineError, RolloutEngine
from prefix_rft.rollout.make_engine import make_engine, max_sequence_length
from prefix_rft.rollout.serving import serving

__all__ = [
    "EngineError",
    "RolloutEngine",
    "make_engine",
    "max_sequence_length",
    "serving",
]
