"""Benchmarks: one file per op, `python -m bench.<op> [--smoke]`."""
