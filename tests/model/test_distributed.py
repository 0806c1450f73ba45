"""Several ranks on one machine, over gloo: the results of one rank, and an orderly end."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, save_config
from prefix_rft.config.sections import ShardingConfig
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.model.distributed import World
from prefix_rft.train.checkpoint import list_checkpoints
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.run import Setup, train
from tests.model.rank_worker import given
from tests.tiny import make_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


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
    output_of(torchrun("tests/model/rank_worker.py", *files, ranks=ranks))
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize(
    ("tied", "sharding", "ranks", "trainer", "dtype", "tolerance"),
    [
        (False, {}, 2, {"prompts_per_update": 4}, "float64", 1e-9),
        (True, {}, 2, {"prompts_per_update": 2}, "float64", 1e-9),
        (False, {"replicas": 2}, 2, {"prompts_per_update": 2}, "float64", 1e-9),
        (True, {"cpu_offload": True}, 1, {"prompts_per_update": 2}, "float64", 1e-9),
        # One row per micro-batch: in the last round some ranks have none.
        (False, {}, 3, {"prompts_per_update": 4, "micro_batch_tokens": 1}, "float32", 1e-6),
    ],
)
def test_one_step_equals_that_of_one_process(
    tmp_path, tied, sharding, ranks, trainer, dtype, tolerance
) -> None:
    config = make_run(
        tmp_path,
        tied=tied,
        model={"dtype": dtype},
        sharding=sharding,
        optimizer={"lr": 1e-2, "eps": 1e-4},  # eps: rounding decides no update's sign
        trainer={"micro_batch_tokens": 50} | trainer,
    )
    alone = World()
    with Setup(replace(config, sharding=ShardingConfig()), config.model.path, alone) as setup:
        trainer = setup.trainer()
        groups = trainer.rollouts(StepMetrics(), Interrupt(alone))
        trainer.rollouts = given(groups)
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


def train_on_ranks(config: Config, folder: Path, *, ranks: int = 2) -> subprocess.Popen:
    """`prefix-rft train CONFIG --resume` under torchrun."""
    save_config(config, folder / "run.toml")
    command = ["-m", "prefix_rft", "train", folder / "run.toml", "--resume"]
    return torchrun(*command, ranks=ranks)


def with_steps(config: Config, **fields: object) -> Config:
    return replace(config, trainer=replace(config.trainer, **fields))


def final_weights(config: Config) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(config.run_dir / "model").state_dict()


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_processes(launcher: subprocess.Popen) -> dict[int, int]:
    """Process ids by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        ranks |= {int(v.removeprefix("RANK=")): pid for v in variables if v.startswith("RANK=")}
    return ranks


def test_two_ranks_stopped_by_sigterm_save_and_go_on_as_if_never_stopped(tmp_path) -> None:
    config = with_steps(make_run(tmp_path), num_steps=30, checkpoint_every=0)
    process = train_on_ranks(config, tmp_path)
    metrics = config.run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"kind": "train"' in metrics.read_text(), process)
    ranks = rank_processes(process)
    assert sorted(ranks) == [0, 1]
    for pid in ranks.values():
        os.kill(pid, signal.SIGTERM)
    output_of(process)  # torchrun reports 0, so both ranks ended with 0
    [checkpoint] = list_checkpoints(config.run_dir)
    assert 1 <= int(checkpoint.name.removeprefix("step-")) < 30

    output_of(train_on_ranks(config, tmp_path))
    whole = replace(config, output_dir=str(tmp_path / "uninterrupted"))
    output_of(train_on_ranks(whole, tmp_path))
    ours, theirs = final_weights(config), final_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_rank_ends_the_others_and_leaves_the_last_checkpoint(tmp_path) -> None:
    config = with_steps(make_run(tmp_path), num_steps=10_000, checkpoint_every=2)
    process = train_on_ranks(config, tmp_path)
    wait_for(lambda: len(list_checkpoints(config.run_dir)) == 2, process)
    os.kill(rank_processes(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 0: another rank is gone" in output and "--resume" in output
    checkpoint = list_checkpoints(config.run_dir)[-1]
    with Setup(config, config.model.path, World()) as setup:  # one process reads what two wrote
        trainer = setup.trainer()
        trainer.restore(checkpoint)
    assert trainer.step_index == int(checkpoint.name.removeprefix("step-"))


def test_an_error_of_one_rank_ends_all_and_saves(tmp_path, monkeypatch) -> None:
    config = make_run(tmp_path, reward={"function": "tests.tiny:nonsense_on_rank_1"})
    config = with_steps(config, num_steps=10_000, checkpoint_every=0)
    monkeypatch.setenv("METRICS", str(config.run_dir / "metrics.jsonl"))
    output, _ = train_on_ranks(config, tmp_path).communicate(timeout=120)
    assert output.count("error: reward.function 'tests.tiny:nonsense_on_rank_1'") == 2
    [checkpoint] = list_checkpoints(config.run_dir)
    assert int(checkpoint.name.removeprefix("step-")) >= 2


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_a_checkpoint_goes_from_one_number_of_ranks_to_another(tmp_path, ranks) -> None:
    """Two steps on one number of ranks, then none on the other: the same weights come out."""
    config = with_steps(make_run(tmp_path), num_steps=2)
    results = []
    for number in ranks:
        if number == 1:
            train(config, resume=True)
        else:
            output_of(train_on_ranks(config, tmp_path, ranks=number))
        results.append(final_weights(config))
        # Evaluation, export and summary of the finished run are done again from its checkpoint.
        (config.run_dir / "summary.json").unlink()
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda", 0)])
def test_one_process_computes_on_the_current_device(monkeypatch, name, index) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    World(device=torch.device(name))
    assert chosen == [index]


def test_replicas_must_divide_the_processes(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="sharding.replicas: expected a divisor of the 3"):
        World(ShardingConfig(replicas=2))
