"""What each rank of tests/model/test_distributed.py runs, under torchrun.

    rank_worker.py CONFIG.toml GROUPS OUT [CONFIG.toml GROUPS OUT ...]

One training step of a configuration on the pickled groups; rank 0 writes weights and metrics. All
configurations have the ranks of the first.
"""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from prefix_rft.config import load_config
from prefix_rft.data_types import Group
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.model.distributed import World, full_tensor
from prefix_rft.model.loading import resolve_device
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.run import Setup


def given(groups: list[Group]) -> Callable[[StepMetrics, Interrupt], list[Group]]:
    """A replacement for `Trainer.rollouts` that returns `groups`."""

    def rollouts(step_metrics: StepMetrics, interrupt: Interrupt) -> list[Group]:
        with step_metrics.phase("generate"):
            return groups

    return rollouts


def step(world: World, config_file: str, groups_file: str, out: str) -> None:
    config = load_config(config_file)
    groups = pickle.loads(Path(groups_file).read_bytes())
    with Setup(config, config.model.path, world) as setup:
        trainer = setup.trainer()
        if groups is not None:
            trainer.rollouts = given(groups)
        metrics, sample = trainer.train_step(Interrupt(world))
        named = dict(setup.policy.model.named_parameters())
        weights = {name: full_tensor(weight.detach()) for name, weight in named.items()}
        assert len({repr(each) for each in world.all_gather_object(sample)}) == 1
        if world.is_main:
            torch.save({"weights": weights, "metrics": metrics}, out)


def main(files: list[str]) -> None:
    first = load_config(files[0])
    with World(first.sharding, resolve_device(first.model)) as world:
        for start in range(0, len(files), 3):
            step(world, *files[start : start + 3])


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # interpreter shutdown can abort on a thread of the process group
