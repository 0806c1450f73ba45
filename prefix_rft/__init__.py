"""Prefix-RFT: reinforcement fine-tuning in which one rollout of a group starts from a piece of a demonstration."""

__version__ = "0.1.0"
