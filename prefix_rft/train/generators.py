"""The states of the random generators of a process, as JSON has them."""

import random

import numpy as np
import torch


def rng_states() -> dict[str, list]:
    """Of python, numpy and torch."""
    name, key, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [name, key.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()  # this rank's device
    return states


def set_rng_states(states: dict[str, list]) -> None:
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
