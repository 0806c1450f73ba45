"""Engines that generate completions; each is imported only when a run uses it."""

from prefix_rft.rollout.engine import EngineError, RolloutEngine
from prefix_rft.rollout.make_engine import fit_lengths, make_engine, max_sequence_length
from prefix_rft.rollout.serve import serve_vllm
from prefix_rft.rollout.serving import serving

__all__ = [
    "EngineError",
    "RolloutEngine",
    "fit_lengths",
    "make_engine",
    "max_sequence_length",
    "serve_vllm",
    "serving",
]
