"""Several ranks on one machine, over gloo: the same results as one, and an orderly end."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_rft.checkpoint import list_checkpoints, load_checkpoint
from prefix_rft.config import Config, ConfigError, ShardingConfig, save_config
from prefix_rft.distributed import World
from prefix_rft.interrupt import Interrupt
from prefix_rft.ledger import Ledger
from prefix_rft.run import Setup, train
from tests.tiny import make_run

ROOT = Path(__file__).parent.parent


def torchrun(*arguments: object, ranks: int = 2, **options) -> subprocess.Popen:
    """Started on `ranks` processes of this machine; its output is one stream of text."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", str(ranks), *map(str, arguments)],
        env=os.environ | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def output_of(process: subprocess.Popen, *, timeout: float = 120) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def step_on_ranks(config: Config, groups, folder: Path, *, ranks: int = 2) -> dict:
    """Weights and metrics after one step, computed by `ranks` processes."""
    save_config(config, folder / "step.toml")
    (folder / "groups").write_bytes(pickle.dumps(groups))
    files = [folder / name for name in ("step.toml", "groups", "out.pt")]
    output_of(torchrun("tests/rank_worker.py", *files, ranks=ranks))
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize(
    ("tied", "sharding", "ranks", "prompts_per_update", "dtype", "tolerance"),
    [
        (False, {}, 2, 4, "float64", 1e-9),
        (True, {}, 2, 2, "float64", 1e-9),
        (False, {"replicas": 2}, 2, 2, "float64", 1e-9),
        (True, {"cpu_offload": True}, 1, 2, "float64", 1e-9),
        (False, {}, 3, 4, "float32", 1e-6),
    ],
)
def test_one_step_equals_that_of_one_process(
    tmp_path, tied, sharding, ranks, prompts_per_update, dtype, tolerance
) -> None:
    config = make_run(
        tmp_path,
        tied=tied,
        model={"dtype": dtype},
        sharding=sharding,
        optimizer={"lr": 1e-2, "eps": 1e-4},  # a small gradient's sign is no matter of rounding
        trainer={"prompts_per_update": prompts_per_update, "micro_batch_tokens": 50},
    )
    alone = World()
    with Setup(replace(config, sharding=ShardingConfig()), config.model.path, alone) as setup:
        trainer = setup.trainer()
        groups = trainer.rollouts(Ledger(), Interrupt(alone))
        trainer.rollouts = lambda ledger, interrupt: groups
        metrics, _ = trainer.train_step(Interrupt(alone))
    before = AutoModelForCausalLM.from_pretrained(config.model.path).state_dict()
    result = step_on_ranks(config, groups, tmp_path, ranks=ranks)
    moved = 0.0
    for name, weight in setup.policy.model.named_parameters():
        assert (result["weights"][name] - weight).abs().max() < tolerance, name
        moved = max(moved, (weight - before[name]).abs().max().item())
    assert moved > 1e-3
    for name, value in metrics.items():
        if not name.startswith(("time/", "throughput/", "memory/")):
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def train_on_ranks(config: Config, folder: Path, *, ranks: int = 2, **options) -> subprocess.Popen:
    save_config(config, folder / "run.toml")
    command = ["-m", "prefix_rft.cli", "train", folder / "run.toml", "--resume"]
    return torchrun(*command, ranks=ranks, **options)


def final_weights(config: Config) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(config.run_dir / "model").state_dict()


def with_steps(config: Config, **fields) -> Config:
    return replace(config, trainer=replace(config.trainer, **fields))
