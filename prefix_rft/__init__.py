"""Prefix-RFT: RL fine-tuning in which one rollout of a group starts inside a demonstration."""

__version__ = "0.1.0"
