"""How much of a demonstration a hybrid rollout starts from: schedules and the cut. Pure.

Source: arXiv 2507.01679, section 3 (window with a cosine-decaying lower end).
"""

import math
from collections.abc import Sequence

from prefix_rft.config import PrefixConfig


def prefix_window(step: int, *, config: PrefixConfig, horizon_steps: int) -> tuple[float, float]:
    """The interval from which the prefix ratio of `step` (counted from 0) is drawn.

    `cosine_window` and `linear_window` let the lower end fall from `config.high` to `config.low`
    over `horizon_steps` and keep the upper end; `cosine` moves both ends together; `uniform` is
    [low, high] throughout; `constant` is always `high`.
    """
    low, high = config.low, config.high
    progress = min(step / horizon_steps, 1.0)
    cosine = low + 0.5 * (high - low) * (1 + math.cos(math.pi * progress))
    match config.schedule:
        case "cosine_window":
            return cosine, high
        case "linear_window":
            return high - (high - low) * progress, high
        case "cosine":
            return cosine, cosine
        case "uniform":
            return low, high
        case "constant":
            return high, high


def cut_prefix(
    demonstration_ids: Sequence[int], ratio: float, *, min_tokens: int, max_response_length: int
) -> tuple[int, ...]:
    """The first floor(ratio * len) tokens, at least `min_tokens`, never the whole demonstration.

    Raises:
        ValueError: the demonstration has fewer than 2 tokens, or the prefix leaves no room in the
            response for a continuation.
    """
    length = len(demonstration_ids)
    if length < 2:
        raise ValueError(f"demonstration_ids: expected at least 2 tokens to cut, got {length}")
    num_tokens = min(max(math.floor(ratio * length), min_tokens), length - 1)
    if num_tokens >= max_response_length:
        raise ValueError(
            f"prefix: expected fewer than max_response_length = {max_response_length} tokens, "
            f"got {num_tokens} of a demonstration of {length}"
        )
    return tuple(demonstration_ids[:num_tokens])
