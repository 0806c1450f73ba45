"""Rollout engines: what generates completions for a list of requests."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from prefix_rft.checks import UserError
from prefix_rft.data_types import Completion, RolloutRequest

OnDone = Callable[[int, Completion], None]


class EngineError(UserError):
    """An engine outside the trainer's processes is gone, or holds other weights than were sent."""


class RolloutEngine(Protocol):
    """Generates with the weights of the last `update_weights`, numbered `weights_version`."""

    weights_version: int | None  # None: it holds none
    shares_module: bool  # generates by the trainer's own module, which must be whole meanwhile
    is_collective: bool  # ranks wait for each other in `generate`

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Take over the weights of `model`, a transformers causal language model. Collective."""
        ...

    def sleep(self) -> None:
        """Give up the memory that training can use; `update_weights` may have to come next."""
        ...

    def close(self) -> None:
        """End what the engine has started, while its ranks can still talk. Collective."""
        ...

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        seed: int,
        weights_version: int,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per request, in order.

        Args:
            on_done: called with the index of a request and its completion, as soon as it is there.
            temperature: of the sampling and of the log-probs; 0 is greedy, with log-probs at 1.
            seed: equal requests, seed and weights give equal tokens.
        Raises:
            RuntimeError: `weights_version` is not the engine's: the weights are stale.
            ValueError: a request without prompt or budget, or too long for the model.
        """
        ...


def check_call(
    requests: Sequence[RolloutRequest],
    *,
    temperature: float,
    asked_version: int,
    version: int | None,
    max_length: int | None,
    max_length_source: str,
) -> None:
    """Refuse what no engine can generate; see `RolloutEngine.generate`.

    Args:
        version: that of the weights the engine holds; None: it holds none.
        max_length: tokens of prompt, prefix and continuation together; None: any number.
    """
    if version is None:
        raise RuntimeError(
            "stale weights: the engine holds none; update_weights comes before generate, "
            "and again after sleep"
        )
    if asked_version != version:
        raise RuntimeError(
            f"stale weights: generate was asked for version {asked_version}, "
            f"the engine holds version {version}"
        )
    if temperature < 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    for i, request in enumerate(requests):
        if not request.prompt_ids:
            raise ValueError(f"requests[{i}].prompt_ids: expected at least one token, got none")
        if request.max_new_tokens < 1:
            raise ValueError(
                f"requests[{i}].max_new_tokens: expected at least 1, got {request.max_new_tokens}"
            )
        total = len(request.prompt_ids) + len(request.prefix_ids) + request.max_new_tokens
        if max_length is not None and total > max_length:
            raise ValueError(
                f"requests[{i}]: expected at most {max_length} tokens ({max_length_source}), "
                f"got {len(request.prompt_ids)} of prompt + {len(request.prefix_ids)} of prefix + "
                f"{request.max_new_tokens} new"
            )
