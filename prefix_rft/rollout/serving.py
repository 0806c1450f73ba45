"""The phase in which an engine generates: fresh weights before it, memory given back after it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from prefix_rft.model import Policy
from prefix_rft.rollout.engine import RolloutEngine


@contextmanager
def serving(engine: RolloutEngine, policy: Policy, version: int) -> Iterator[None]:
    """While entered, `engine` generates with the weights of `policy`, known as `version`.

    They are pushed unless the engine holds them already. Collective where processes share weights.
    """
    if engine.weights_version != version:
        engine.update_weights(policy.model, version)
    with policy.gathered() if engine.shares_module else nullcontext():
        yield
    engine.sleep()
