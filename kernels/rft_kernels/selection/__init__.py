"""Which prefix tokens are kept: the top fraction of the candidates by entropy (E3)."""

from .op import FIFTH, check_fraction, select_top_entropy

__all__ = ["FIFTH", "check_fraction", "select_top_entropy"]
