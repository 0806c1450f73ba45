"""One small file a method; none knows the model, the engine or the rest of the configuration."""

from prefix_rft.methods.advantage import Advantage, AdvantageScale, group_advantages
from prefix_rft.methods.clipped import LossConfig
from prefix_rft.methods.method import Chart, Figure, Method, Setting, TokenLoss
from prefix_rft.methods.prefix import cut_prefix, prefix_window
from prefix_rft.methods.prefix_rft import PrefixRFT, PrefixRFTConfig
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
    "Advantage",
    "AdvantageScale",
    "Chart",
    "Figure",
    "LossConfig",
    "Method",
    "PrefixRFT",
    "PrefixRFTConfig",
    "Setting",
    "TokenLoss",
    "cut_prefix",
    "declared_charts",
    "declared_progress",
    "find_method",
    "group_advantages",
    "prefix_window",
    "register",
]
