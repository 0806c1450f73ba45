"""A step of every shipped method on two ranks is that of one process."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

from prefix_rft.config import save_config
from prefix_rft.methods import METHODS
from prefix_rft.metrics import StepMetrics
from prefix_rft.model import World
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.run import Setup
from tests.model.rank_worker import given
from tests.model.test_distributed import output_of, torchrun
from tests.tiny import make_run
from tests.train.test_update import largest_difference

pytestmark = pytest.mark.slow

SHIPPED = [name for name, each in METHODS.items() if each.__module__.startswith("prefix_rft.")]
OPTIONS = {"relift": {"relift": {"buffer_size": 1}}}  # so that its other update is part of the step


def even_length_of_some(completions: list[str], answer: list[str], **columns: object):
    """A reward that some problems never get."""
    pairs = zip(completions, answer, strict=True)
    return [float(len(text) % 2 == 0 and int(gold) % 3 != 0) for text, gold in pairs]


def test_two_ranks_step_as_one_process(tmp_path: Path) -> None:
    files, expected = [], {}
    for name in SHIPPED:
        folder = tmp_path / name
        folder.mkdir()
        config = make_run(
            folder,
            method={"name": name},
            model={"dtype": "float64"},
            reward={"function": "tests.methods.test_ranks:even_length_of_some"},
            optimizer={"lr": 1e-2, "eps": 1e-4},
            trainer={"prompts_per_step": 4, "prompts_per_update": 2, "micro_batch_tokens": 40},
            **OPTIONS.get(name, {}),
        )
        with Setup(config, config.model.path, World()) as setup:
            trainer = setup.trainer()
            before = copy.deepcopy(setup.policy.model)
            groups = trainer.rollouts(StepMetrics(), Interrupt())
            trainer.rollouts = given(groups)
            expected[name] = trainer.train_step(Interrupt())[0], setup.policy.model
            assert largest_difference(setup.policy.model, before) > 1e-3
        part = [folder / file for file in ("step.toml", "groups", "out.pt")]
        save_config(config, part[0])
        part[1].write_bytes(pickle.dumps(groups))
        files += part
    output_of(torchrun("tests/model/rank_worker.py", *files), timeout=600)
    for name, (metrics, model) in expected.items():
        result = torch.load(tmp_path / name / "out.pt")
        for parameter, weight in model.named_parameters():
            assert (result["weights"][parameter] - weight).abs().max() < 1e-9, (name, parameter)
        for metric in ("policy/loss_mean", "optim/grad_norm_mean", "optim/updates_sum"):
            assert result["metrics"][metric] == pytest.approx(metrics[metric]), (name, metric)
    assert expected["relift"][0]["optim/updates_sum"] == 3
    assert 0 < expected["hpt"][0]["hpt/replaced_frac"] < 1
