"""The optimizers: their state, a step by hand, and restoring from a checkpoint."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from prefix_rft.checks import ConfigError
from prefix_rft.config import packages
from prefix_rft.config.sections import OptimizerConfig, ShardingConfig
from prefix_rft.model.distributed import World, full_tensor, shard_module
from prefix_rft.train.checkpoint import (
    CheckpointWriter,
    TrainerState,
    checkpoint_dir,
    load_checkpoint,
)
from prefix_rft.train.optimizer import learning_rate, make_optimizer, set_learning_rate

CPU = torch.device("cpu")
CONFIG = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 128)  # 8,192 numbers: torchao does not quantise below 4,096


def take_step(model: nn.Linear, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_one_step_is_that_of_adamw(name) -> None:
    """p - lr * (decay * p + g / (|g| + eps)): at step 1 the averages, unbiased, are g and g^2."""
    if name == "adamw_8bit":
        pytest.importorskip("torchao")
    model = make_model()
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model.parameters(), OptimizerConfig(name=name, **CONFIG), CPU)
    assert [group["params"] for group in optimizer.param_groups] == [[model.weight]]
    set_learning_rate(optimizer, 0.05)
    before = model.weight.detach().clone()
    torch.manual_seed(1)
    model(torch.randn(8, 64)).square().sum().backward()
    grad = model.weight.grad.clone()
    optimizer.step()
    expected = before - 0.05 * (0.3 * before + grad / (grad.abs() + 1e-6))
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("in_background", [False, True])
def test_the_8_bit_state_takes_two_bytes_a_weight_and_survives_a_checkpoint(
    tmp_path, is_sharded, in_background
) -> None:
    pytest.importorskip("torchao")
    config = OptimizerConfig(name="adamw_8bit", **CONFIG)
    with World(ShardingConfig(cpu_offload=is_sharded), CPU) as world:

        def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
            model = make_model()
            if is_sharded:
                shard_module(model, [], world.mesh, param_dtype=None, cpu_offload=True)
            return model, make_optimizer(model.parameters(), config, CPU)

        model, optimizer = make()
        take_step(model, optimizer, 1)
        average = optimizer.state[model.weight]["exp_avg"]
        assert isinstance(average, DTensor) == is_sharded
        local = average.to_local() if is_sharded else average
        assert local.codes.dtype == torch.uint8 and local.codes.shape == (128, 64)
        assert len(local.scale) == 128 * 64 / 256  # one per block of 256
        state = TrainerState(step=1, data_fingerprint="data")
        options = {"keep": 1, "in_background": in_background, "world": world}
        with CheckpointWriter(tmp_path, **options) as checkpoints:
            checkpoints.save(model, {"policy": optimizer}, state)
            take_step(model, optimizer, 2)  # while it is written

        resumed, other = make()
        path = checkpoint_dir(tmp_path, 1)
        load_checkpoint(path, resumed, {"policy": other}, data_fingerprint="data", world=world)
        take_step(resumed, other, 2)
        assert torch.equal(full_tensor(resumed.weight), full_tensor(model.weight))
        assert not torch.equal(full_tensor(model.weight), make_model().weight)


@pytest.mark.parametrize(
    ("schedule", "fractions"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4]),  # 0.2 at step 6
        ("cosine", [1 / 3, 2 / 3, 1, 0.8828, 0.6, 0.3172]),
    ],
)
def test_warm_up_and_end_of_the_learning_rate_can_be_fractions(schedule, fractions) -> None:
    config = OptimizerConfig(
        lr=2.0, schedule=schedule, warmup_fraction=1 / 3, final_lr_fraction=0.2
    )
    rates = [learning_rate(step, config, 6) for step in range(6)]
    assert rates == pytest.approx([2 * fraction for fraction in fractions], abs=1e-4)


def test_torchao_that_is_not_there_is_one_clear_error(monkeypatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optimizer.name: .* pip install '\.\[low-memory\]'"):
        make_optimizer(make_model().parameters(), OptimizerConfig(name="adamw_8bit"), CPU)
