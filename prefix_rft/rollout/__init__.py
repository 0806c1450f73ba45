"""Rollout engines: what generates completions for a list of requests."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from prefix_rft.data_types import Completion, RolloutRequest


class RolloutEngine(Protocol):
    """Generates with the weights of the last `update_weights`, numbered `weights_version`."""

    weights_version: int

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Take over the weights of `model`, a transformers causal language model."""
        ...

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        seed: int,
        weights_version: int,
    ) -> list[Completion]:
        """One completion per request, in order.

        Args:
            temperature: of the sampling and of the log-probs; 0 is greedy, with log-probs at 1.
            seed: equal requests, seed and weights give equal tokens.
        Raises:
            RuntimeError: `weights_version` is not the engine's: the weights are stale.
            ValueError: a request without prompt or budget, or too long for the model.
        """
        ...
