"""Supervised fine-tuning against a straight-line script, on one rank and on two."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, config_from_dict
from prefix_rft.data_types import Problem
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.run import train
from tests.model.test_distributed import step_on_ranks
from tests.tiny import make_run, make_tokenizer, make_trainer
from tests.train.test_update import apply_update, largest_difference

EOS = make_tokenizer().eos_token_id
VOCAB_SIZE = len(make_tokenizer())  # the model has more columns
CONFIG = {
    "method": {"name": "sft"},
    "model": {"dtype": "float64"},
    "rollout": {"max_response_length": 24, "temperature": 0.7},  # of no consequence here
    "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "trainer": {"num_steps": 10, "prompts_per_step": 4, "prompts_per_update": 4},
}


def straight_line_loss(model, problems: list[Problem]) -> torch.Tensor:
    """Mean over all tokens of demonstrations and their ends: one softmax a problem."""
    total, num_tokens = 0.0, 0
    for problem in problems:
        response = (*problem.demonstration_ids, EOS)
        ids = torch.tensor([problem.prompt_ids + response])
        logits = model(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE]
        log_p = torch.log_softmax(logits, -1)[len(problem.prompt_ids) - 1 : -1]
        total = total - log_p[torch.arange(len(response)), torch.tensor(response)].sum()
        num_tokens += len(response)
    return total / num_tokens


def with_trainer(**fields: int) -> dict:
    return CONFIG | {"trainer": CONFIG["trainer"] | fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_tokens": 100_000},
        {"micro_batch_tokens": 30},
        {"micro_batch_tokens": 1},
        {"prompts_per_update": 2, "micro_batch_tokens": 30},
    ],
    ids=["one batch", "some micro-batches", "one row each", "two updates"],
)
def test_a_step_equals_the_straight_line_script(fields: dict) -> None:
    trainer = make_trainer(with_trainer(**fields))
    model = copy.deepcopy(trainer.policy.model)
    groups = trainer.rollouts(None, Interrupt())  # asks neither engine nor clock
    size, moments, losses = trainer.config.trainer.prompts_per_update, {}, []
    for start in range(0, len(groups), size):
        loss = straight_line_loss(model, [group.problem for group in groups[start : start + size]])
        loss.backward()
        apply_update(trainer.config, model, moments, len(losses) + 1)
        losses.append(loss.item())
    metrics, sample = trainer.train_step(Interrupt())
    assert metrics["policy/loss_mean"] == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    assert largest_difference(trainer.policy.model, model) < 1e-9
    assert largest_difference(model, make_trainer(CONFIG).policy.model) > 1e-3
    num_tokens = sum(len(group.problem.demonstration_ids) + 1 for group in groups)
    assert metrics["sft/num_tokens_sum"] == num_tokens
    [shown] = sample["rollouts"]
    assert shown["tokens"][-1] == "<eos>" and all(shown["selected"]) and shown["reward"] is None


@pytest.mark.slow
def test_two_ranks_step_as_one(tmp_path: Path) -> None:
    config = make_run(
        tmp_path,
        method={"name": "sft"},
        model={"dtype": "float64"},
        optimizer={"lr": 1e-2, "eps": 1e-4},
        trainer={"prompts_per_step": 3, "prompts_per_update": 3, "micro_batch_tokens": 20},
    )
    from prefix_rft.model.distributed import World
    from prefix_rft.train.run import Setup

    with Setup(config, config.model.path, World()) as setup:
        trainer = setup.trainer()
        before = copy.deepcopy(setup.policy.model)
        metrics, _ = trainer.train_step(Interrupt())
    result = step_on_ranks(config, None, tmp_path)
    for name, weight in setup.policy.model.named_parameters():
        assert (result["weights"][name] - weight).abs().max() < 1e-9, name
    assert largest_difference(setup.policy.model, before) > 1e-3
    assert result["metrics"]["policy/loss_mean"] == pytest.approx(metrics["policy/loss_mean"])


def sft_run(folder: Path, **sections: dict) -> Config:
    folder.mkdir()
    return make_run(folder, **{"method": {"name": "sft"}} | sections)


def test_epochs_decide_the_steps_and_a_finished_run_is_known(tmp_path: Path, capsys) -> None:
    config = sft_run(tmp_path / "sft", sft={"epochs": 2}, trainer={"num_steps": 500})
    train(config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [each["step"] for each in map(json.loads, lines) if each["kind"] == "train"]
    assert steps == list(range(math.ceil(2 * 8 / 4)))  # 12 rows, 4 of them held out
    capsys.readouterr()
    train(config, resume=True)
    assert "is finished" in capsys.readouterr().out


def test_a_run_folder_is_a_model_to_start_from(tmp_path: Path) -> None:
    sft = sft_run(tmp_path / "sft", trainer={"num_steps": 2})
    trained = train(sft)["trained"]
    (tmp_path / "rl").mkdir()
    rl = make_run(tmp_path / "rl", model={"path": str(sft.run_dir)}, trainer={"num_steps": 1})
    assert train(rl)["base"]["greedy"] == trained["greedy"]
    weights = (rl.run_dir / "model/model.safetensors").read_bytes()
    assert weights != (sft.run_dir / "model/model.safetensors").read_bytes()


def test_a_run_without_a_final_model_is_refused(tmp_path: Path) -> None:
    sft = sft_run(tmp_path / "sft")
    sft.run_dir.mkdir()
    (sft.run_dir / "config.toml").write_text("")
    (tmp_path / "rl").mkdir()
    rl = make_run(tmp_path / "rl", model={"path": str(sft.run_dir)})
    with pytest.raises(ConfigError, match="has no final model yet"):
        train(rl)


def test_problems_without_a_demonstration_are_left_out_and_none_is_an_error(tmp_path: Path) -> None:
    some = sft_run(tmp_path / "some", data={"demonstration_fraction": 0.5}, sft={"epochs": 1})
    train(some)
    records = (some.run_dir / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "train" for line in records) == 1  # 4 of 8 problems
    none = sft_run(tmp_path / "none", data={"demonstration_fraction": 0.0})
    with pytest.raises(ConfigError, match="data.path: expected problems that sft can learn from"):
        train(none)


def test_epochs_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="sft.epochs: expected a whole number above 0"):
        config_from_dict({"sft": {"epochs": 0}})
