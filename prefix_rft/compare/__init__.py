"""Several runs from one base, side by side: starting them, their table, their page."""

from prefix_rft.compare.command import compare

__all__ = ["compare"]
