"""The KL to a reference: where it stands, what it adds to an update, and how it moves."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, config_from_dict
from prefix_rft.config.sections import ShardingConfig
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainRow
from prefix_rft.methods import METHODS, Method, TokenLoss
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.model.distributed import World
from prefix_rft.model.loading import load_model
from prefix_rft.train import setup as run_setup
from prefix_rft.train.checkpoint import CheckpointError, list_checkpoints
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.packing import pack
from prefix_rft.train.run import Setup, train
from prefix_rft.train.trainer import Trainer
from tests.methods.twin import View
from tests.model.test_distributed import (
    final_weights,
    output_of,
    step_on_ranks,
    train_on_ranks,
    with_steps,
)
from tests.tiny import make_model, make_run, make_tokenizer, make_trainer
from tests.train.test_checkpoint import is_equal, run, save
from tests.train.test_update import (
    CONFIG,
    VOCAB_SIZE,
    apply_update,
    largest_difference,
    straight_line_update,
)

EXACT = {"lr": 1e-2, "eps": 1e-4}  # eps: rounding decides no update's sign
KL = {"kl": "k3", "kl_coef": 0.2}


def save_other(folder: Path, *, seed: int = 1) -> str:
    """A model like that of `make_run`, with other weights, and its tokenizer."""
    make_tokenizer().save_pretrained(folder / "other")
    make_model(VOCAB_SIZE, seed=seed).save_pretrained(folder / "other")
    return str(folder / "other")


def assert_two_steps_equal_the_script(trainer: Trainer, reference: torch.nn.Module) -> None:
    """To 1e-9, in float64; in the second step the policy is no longer where it began."""
    model, moments = copy.deepcopy(trainer.policy.model), {}
    for step in (1, 2):
        groups = trainer.rollouts(StepMetrics(), Interrupt())
        loss, kl = straight_line_update(trainer.config, model, groups, reference=reference)
        loss.backward()
        apply_update(trainer.config, model, moments, step)
        metrics, _ = trainer.train_step(Interrupt())
        assert metrics["policy/loss_mean"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["policy/ref_kl_mean"] == pytest.approx(kl, abs=1e-9)
        assert metrics["rollout/left_out_frac"] == 0  # rows without advantage have a gradient
        assert metrics["time/reference_s"] > 0
        assert largest_difference(trainer.policy.model, model) < 1e-9
    assert abs(kl) > 1e-3


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_updates_equal_the_straight_line_script(kl: str) -> None:
    trainer = make_trainer(
        CONFIG | {"loss": KL | {"kl": kl}, "optimizer": CONFIG["optimizer"] | EXACT}
    )
    assert_two_steps_equal_the_script(trainer, copy.deepcopy(trainer.policy.model))


def exact_run(folder: Path, **sections: dict) -> Config:
    sections = {"loss": KL, "optimizer": EXACT, "model": {"dtype": "float64"}} | sections
    sections["trainer"] = {"prompts_per_update": 4} | sections.get("trainer", {})
    return make_run(folder, **sections)


def test_the_reference_may_be_another_model(tmp_path: Path) -> None:
    config = exact_run(tmp_path, reference={"model": save_other(tmp_path)})
    with Setup(config, config.model.path, World()) as setup:
        reference = load_model(config.model, config.reference.model)
        assert_two_steps_equal_the_script(setup.trainer(), reference)


def test_base_weights_under_adapters_are_the_reference_themselves(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = exact_run(tmp_path, model={"dtype": "float64", "lora_rank": 2})
    base = make_model(VOCAB_SIZE).double()
    with Setup(config, config.model.path, World()) as setup:
        trainer = setup.trainer()
        assert trainer.reference.policy is trainer.policy
        for _ in range(2):
            groups = trainer.rollouts(StepMetrics(), Interrupt())
            _, kl = straight_line_update(config, trainer.policy.model, groups, reference=base)
            metrics, _ = trainer.train_step(Interrupt())
            assert metrics["policy/ref_kl_mean"] == pytest.approx(kl, abs=1e-9)
        assert kl > 1e-4
        moving = replace(config, reference=replace(config.reference, update_every=1))
    with Setup(moving, config.model.path, World()) as setup:
        trainer = setup.trainer()
        assert trainer.reference.policy is not trainer.policy
        trainer.train_step(Interrupt())
        assert largest_difference(trainer.reference.policy.model, trainer.policy.model) == 0
        metrics, _ = trainer.train_step(Interrupt())
        assert metrics["policy/ref_kl_mean"] == pytest.approx(0, abs=1e-12)


def test_a_moving_reference_is_the_policy_of_the_last_whole_period(tmp_path: Path) -> None:
    values = {
        "rollout": {"group_size": 4, "max_response_length": 16},
        "loss": KL,
        "reference": {"update_every": 2},
        "trainer": {"num_steps": 6, "prompts_per_step": 3, "prompts_per_update": 3},
        "optimizer": {"lr": 1e-2},
    }
    whole, policies, records = make_trainer(values), [], []
    for step in range(6):
        policies.append(copy.deepcopy(whole.policy.model))
        reference = whole.reference.policy.model
        assert is_equal(reference, policies[2 * (step // 2)])
        assert step % 2 == 0 or not is_equal(reference, policies[step])
        records += run(whole, 1)
        if step == 2:  # in the middle of a period
            save(whole, tmp_path)

    resumed = make_trainer(values)
    run(resumed, 1)
    resumed.restore(list_checkpoints(tmp_path)[-1])
    assert resumed.step_index == 3
    assert is_equal(resumed.reference.policy.model, policies[2])
    assert run(resumed, 3) == records[3:]
    assert is_equal(resumed.policy.model, whole.policy.model)
    assert is_equal(resumed.reference.policy.model, whole.reference.policy.model)


def test_a_checkpoint_without_the_reference_that_is_needed_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(CONFIG | {"loss": KL})
    save(trainer, tmp_path)
    [checkpoint] = list_checkpoints(tmp_path)
    make_trainer(CONFIG | {"loss": KL}).restore(checkpoint)
    moving = make_trainer(CONFIG | {"loss": KL, "reference": {"update_every": 2}})
    with pytest.raises(CheckpointError, match="expected the weights of the reference"):
        moving.restore(checkpoint)


def test_a_whole_run_with_a_reference(tmp_path: Path) -> None:
    """Resumed in the middle of a period, through the folder, it ends where it would have."""
    sections = {"loss": KL, "reference": {"update_every": 2}, "method": {"name": "rft"}}
    config = make_run(tmp_path, **sections)
    train(with_steps(config, num_steps=3))
    train(config, resume=True)
    report = (config.run_dir / "report.html").read_text()
    assert "KL to the reference" in report
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    ours, theirs = final_weights(config), final_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_is_loaded_without_a_term_that_needs_it(tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(run_setup, "load_reference", fail)
    monkeypatch.setattr(run_setup, "check_reference", fail)
    for loss in ({}, {"kl": "k3"}, {"kl_coef": 0.1}):
        config = make_run(tmp_path, loss=loss, reference={"model": "nowhere", "update_every": 3})
        with Setup(config, config.model.path, World()) as setup:
            trainer = setup.trainer()
            metrics, _ = trainer.train_step(Interrupt())
        assert trainer.reference is None
        assert "policy/ref_kl_mean" not in metrics and "time/reference_s" not in metrics
    config = make_run(tmp_path, loss=KL)
    with Setup(config, config.model.path, World(), trains=False):
        pass  # to evaluate needs none
    with pytest.raises(AssertionError, match="loaded"):
        Setup(config, config.model.path, World())


@pytest.mark.parametrize(
    ("tokenizer_step", "message"),
    [
        (None, "reference.model: expected a folder with a tokenizer"),
        (2, r"reference.model: expected a model with the tokens of the policy.* 42 of 43 differ"),
    ],
)
def test_a_reference_that_cannot_serve_is_refused(tmp_path, tokenizer_step, message) -> None:
    folder = tmp_path / "other"
    if tokenizer_step is not None:
        make_model(VOCAB_SIZE).save_pretrained(folder)
        make_tokenizer(tokenizer_step).save_pretrained(folder)
    config = make_run(tmp_path, loss=KL, reference={"model": str(folder)})
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (config.run_dir / "metrics.jsonl").exists()


def test_a_model_of_other_shapes_may_be_the_reference_but_not_become_the_policy(tmp_path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "other")
    make_model(VOCAB_SIZE, tied=True).save_pretrained(tmp_path / "other")
    for update_every in (0, 2):
        reference = {"model": str(tmp_path / "other"), "update_every": update_every}
        config = make_run(tmp_path, loss=KL, reference=reference)
        with Setup(config, config.model.path, World()) as setup:
            if update_every:
                with pytest.raises(ConfigError, match="reference.update_every: expected 0, as"):
                    setup.trainer()
            else:
                assert setup.trainer().reference.policy.model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": {"kl": "k4"}}, "loss.kl"),
        ({"loss": {"kl_coef": -0.1}}, "loss.kl_coef"),
        ({"reference": {"model": ""}}, "reference.model"),
        ({"reference": {"update_every": -1}}, "reference.update_every"),
        ({"loss": KL, "method": {"name": "sft"}}, "loss.kl: expected none with the method sft"),
        ({"loss": KL, "method": {"name": "rl_sft_loss"}}, "loss.kl: expected none"),
        (
            {"model": {"lora_rank": 2}, "reference": {"model": "other", "update_every": 2}},
            "reference.update_every: expected 0 with adapters",
        ),
    ],
)
def test_what_no_run_could_mean_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_the_reference_is_held_in_the_dtype_of_the_compute(tmp_path: Path) -> None:
    config = make_run(tmp_path, loss=KL, model={"dtype": "bfloat16"})
    with Setup(config, config.model.path, World()) as setup:
        trainer = setup.trainer()
        reference = trainer.reference.policy
        assert reference.model.dtype == torch.bfloat16
        assert trainer.policy.model.dtype == torch.float32
        [mini_batch, *_] = trainer.method.mini_batches(
            trainer.rollouts(StepMetrics(), Interrupt()), 0
        )
        batch = pack(mini_batch.rows, device=reference.device, dtype=reference.stats_dtype)
        ours, theirs = (
            policy.token_stats(batch).log_probs for policy in (trainer.policy, reference)
        )
        assert 0 < (ours - theirs).abs().mean() < 0.03


def test_a_sharded_reference_moves_like_a_whole_one(tmp_path: Path) -> None:
    config = exact_run(tmp_path, reference={"update_every": 1})
    weights = []
    for sharding in (ShardingConfig(), ShardingConfig(cpu_offload=True)):
        with World(sharding) as world:
            placed = replace(config, sharding=sharding)
            with Setup(placed, config.model.path, world) as setup:
                trainer = setup.trainer()
                metrics = [trainer.train_step(Interrupt(world))[0] for _ in range(2)]
                for policy in (trainer.policy, trainer.reference.policy):
                    named = policy.model.named_parameters()
                    weights.append(
                        {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in named}
                    )
        assert metrics[1]["policy/ref_kl_mean"] == pytest.approx(0, abs=1e-12)
    first, *others = weights
    for other in others:
        assert max((first[n] - w).abs().max().item() for n, w in other.items()) < 1e-9


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    config = exact_run(tmp_path, reference={"model": save_other(tmp_path), "update_every": 1})
    config = with_steps(config, micro_batch_tokens=50)
    with Setup(config, config.model.path, World()) as setup:
        trainer = setup.trainer()
        groups = trainer.rollouts(StepMetrics(), Interrupt())
        metrics, _ = trainer.train_step(Interrupt())
    result = step_on_ranks(config, groups, tmp_path)
    for name, weight in setup.policy.model.named_parameters():
        assert (result["weights"][name] - weight).abs().max() < 1e-9, name
    assert metrics["policy/ref_kl_mean"] > 0.1
    for name in ("policy/ref_kl_mean", "policy/loss_mean"):
        assert result["metrics"][name] == pytest.approx(metrics[name], abs=1e-9)


@pytest.mark.slow
def test_two_ranks_resume_in_the_middle_of_a_period(tmp_path: Path) -> None:
    sections = {"loss": KL, "reference": {"update_every": 2}, "method": {"name": "rft"}}
    config = make_run(tmp_path, **sections)
    for num_steps in (3, 4):
        output_of(train_on_ranks(with_steps(config, num_steps=num_steps), tmp_path))
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    output_of(train_on_ranks(whole, tmp_path))
    ours, theirs = final_weights(config), final_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Distance(Method):
    """Squared distances to the reference, of the distributions at another temperature."""

    name = "distance"
    uses_reference = True

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        return [RolloutRequest(prompt_ids=problem.prompt_ids, max_new_tokens=12)] * 2

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        rows = [
            TrainRow.of_rollout(rollout, advantage=0.0, prefix_advantage=0.0)
            for group in groups
            for rollout in group.rollouts
        ]
        return [MiniBatch(rows=rows, normalizer=10.0)]

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        def function(log_probs, entropy, ref_log_probs):
            return (log_probs - ref_log_probs) ** 2, {"kl_sum": log_probs - ref_log_probs}

        return TokenLoss(function, inputs=("ref_log_probs",), temperature=2.0)


def test_a_loss_of_ones_own_takes_the_reference_at_its_temperature() -> None:
    METHODS["distance"] = Distance
    values = CONFIG | {"method": {"name": "distance"}, "optimizer": CONFIG["optimizer"] | EXACT}
    try:
        trainer = make_trainer(values)
        trainer.reference.policy.model.load_state_dict(make_model(VOCAB_SIZE, seed=1).state_dict())
        Distance.uses_reference = False
        without = make_trainer(values)
    finally:
        Distance.uses_reference = True
        del METHODS["distance"]
    model = copy.deepcopy(trainer.policy.model)
    ours, theirs = View(model, 2.0), View(trainer.reference.policy.model, 2.0)
    differences = torch.cat(
        [
            ours.rollout(rollout)[0] - theirs.rollout(rollout)[0].detach()
            for group in trainer.rollouts(StepMetrics(), Interrupt())
            for rollout in group.rollouts
        ]
    )
    (differences.square().sum() / 10.0).backward()
    apply_update(trainer.config, model, {}, 1)
    metrics, _ = trainer.train_step(Interrupt())
    assert largest_difference(trainer.policy.model, model) < 1e-9
    assert metrics["policy/ref_kl_mean"] == pytest.approx(differences.mean().item(), abs=1e-9)
    with pytest.raises(ValueError, match="uses_reference"):
        without.train_step(Interrupt())
