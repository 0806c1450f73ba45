"""Prefix-RFT: blending supervised and reinforcement fine-tuning (arXiv 2507.01679)."""
