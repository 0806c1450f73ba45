"""Rollout engines: what generates completions for a list of requests."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from prefix_rft.checks import UserError
from prefix_rft.data_types import Completion, RolloutRequest

OnDone = Callable[[int, Completion], None]


class EngineError(UserError):
    """An engine outside the trainer is gone, or does not hold the weights that were sent to it."""


class RolloutEngine(Protocol):
    """Generates with the weights of the last `update_weights`, numbered `weights_version`."""

    weights_version: int | None  # None: it holds no weights
    shares_module: bool  # generates with the trainer's module, which must be gathered then
    is_collective: bool  # ranks wait for each other in `generate`

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Use the weights of `model`, a causal language model of transformers. Collective."""
        ...

    def sleep(self) -> None:
        """Free memory for training; `update_weights` may be needed before the next `generate`."""
        ...

    def ignore_ends(self) -> None:
        """Generate each response to its full length from now on, whatever would end it."""
        ...

    def close(self) -> None:
        """Shut down what the engine started, while its ranks can still communicate. Collective."""
        ...

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        seed: int,
        weights_version: int,
        top_p: float = 1.0,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per request, in order.

        Args:
            temperature: for sampling and for the log-probs; 0 is greedy, with log-probs at 1.
            seed: the same requests, seed and weights give the same tokens.
            weights_version: the version to generate with, for the engine to confirm.
            top_p: sample from the most likely tokens that make up this probability; log-probs are
                then of what was sampled from. Training takes 1, the whole softmax.
            on_done: called with a request's index and its completion as soon as that is known.
        Raises:
            RuntimeError: the engine holds another version: its weights are stale.
            ValueError: a request has no prompt or no budget, or is too long for the model.
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
    """Raise the errors of `RolloutEngine.generate`.

    Args:
        version: of the weights the engine holds; None: it holds no weights.
        max_length: tokens of prompt, prefix and continuation together; None: no limit.
        max_length_source: where that limit comes from, for the message.
    """
    if version is None:
        raise RuntimeError(
            "stale weights: the engine holds none; call update_weights before generate, "
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
