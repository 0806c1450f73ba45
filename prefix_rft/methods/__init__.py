"""One small file a method; none knows the model, the engine or the rest of the configuration."""

from prefix_rft.methods.advantage import AdvantageScale
from prefix_rft.methods.clipped import LossConfig
from prefix_rft.methods.method import Chart, Figure, Method, Setting, TokenLoss
from prefix_rft.methods.registry import (
    DEFAULT_METHOD,
    METHODS,
    declared_charts,
    declared_progress,
    find_method,
    register,
)

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "AdvantageScale",
    "Chart",
    "Figure",
    "LossConfig",
    "Method",
    "Setting",
    "TokenLoss",
    "declared_charts",
    "declared_progress",
    "find_method",
    "register",
]
