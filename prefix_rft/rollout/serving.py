"""The phase in which an engine generates: weights are pushed before it, memory freed after it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from prefix_rft.model import Policy
from prefix_rft.rollout.engine import RolloutEngine


@contextmanager
def serving(engine: RolloutEngine, policy: Policy, version: int) -> Iterator[None]:
    """Let `engine` generate with the weights of `policy`, numbered `version`, while entered.

    They are pushed unless the engine already holds them. Collective if the model is sharded.
    """
    if engine.weights_version != version:
        engine.update_weights(policy.model, version)
    with policy.gathered() if engine.shares_module else nullcontext():
        yield
    engine.sleep()
