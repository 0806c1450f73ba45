"""ReLIFT beside its twin: the buffer's order and threshold, its optimizer, repeated steps."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.methods.buffer import Buffer
from prefix_rft.metrics import LogProbGapError, StepMetrics
from prefix_rft.train.checkpoint import CheckpointWriter, list_checkpoints
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.trainer import Trainer
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, method_trainer, take_step
from tests.tiny import make_problems, make_tokenizer
from tests.train.test_update import largest_difference


def rl(now: View, before: View, groups, *, entropy: float = 0.001) -> torch.Tensor:
    """sum -A ratio / (N T) - entropy mean(H), over all groups, the unsolved ones too."""
    policy, entropies = 0.0, []
    for group in groups:
        mean = sum(rollout.reward for rollout in group.rollouts) / GROUP_SIZE
        for rollout in group.rollouts:
            log_probs, h = now.rollout(rollout)
            old, _ = before.rollout(rollout)
            policy = policy - (rollout.reward - mean) * (log_probs - old.detach()).exp().sum()
            entropies.append(h)
    policy = policy / (len(groups) * GROUP_SIZE * MAX_LENGTH)
    return policy - entropy * torch.cat(entropies).mean()


def sft(now: View, before: View, groups, *, indices, entropy: float = 0.001) -> torch.Tensor:
    """mean(-log p) - entropy mean(H) over the demonstrations `indices`, at temperature 1."""
    problems = {group.problem.index: group.problem for group in groups}
    view = View(now.model, temperature=1.0)
    figures = [view.demonstration(problems[index]) for index in indices]
    log_probs, entropies = map(torch.cat, zip(*figures, strict=True))
    return -log_probs.mean() - entropy * entropies.mean()


def only(*solved: int):
    """Rewards: of the problems `solved` some rollouts, of others none."""
    return lambda text, problem: float(problem.index in solved and sum(map(ord, text)) % 2 == 0)


def trainer_of(options: dict, *, solved: Sequence[int] = (0,), **sections: dict) -> Trainer:
    trainer = method_trainer("relift", options, **sections)
    trainer.rewarder.rule = only(*solved)
    return trainer


def unsolved(trainer: Trainer) -> list[int]:
    """Indices of the unsolved problems of the first step, in their order."""
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    return [
        group.problem.index for group in groups if not any(each.reward for each in group.rollouts)
    ]


@pytest.mark.parametrize(
    "fields",
    [{"micro_batch_tokens": 100_000}, {"micro_batch_tokens": 40}, {"micro_batch_tokens": 1}],
    ids=["one batch", "some micro-batches", "one row each"],
)
def test_a_step_with_both_updates_equals_the_twin(fields: dict) -> None:
    options = {"buffer_size": 2, "sft_lr": 3e-3, "sft_max_grad_norm": 0.3, "sft_entropy_coef": 0.05}
    trainer = trainer_of(options, trainer=fields)
    updates = [
        (rl, slice(0, 4), "policy"),
        (partial(sft, indices=unsolved(trainer)[:2], entropy=0.05), slice(0, 4), "sft"),
    ]
    step = take_step(trainer, updates)
    for ours, expected in step.losses:
        assert abs(ours - expected) <= 1e-9 * abs(expected)
    assert max(step.gradient_errors) < 1e-9
    assert step.weight_error < 1e-9 < 1e-3 < step.moved
    assert step.metrics["optim/lr"] == 1e-2 and step.metrics["optim/sft_lr"] == 3e-3
    assert step.metrics["relift/buffer_sum"] == 1
    assert step.metrics["rollout/left_out_frac"] == 0  # the unsolved stay in the RL update


def test_all_rl_updates_come_first() -> None:
    trainer = trainer_of({"buffer_size": 3}, trainer={"prompts_per_update": 2})
    updates = [
        (rl, slice(0, 2), "policy"),
        (rl, slice(2, 4), "policy"),
        (partial(sft, indices=unsolved(trainer)), slice(0, 4), "sft"),
    ]
    step = take_step(trainer, updates)
    assert max(step.gradient_errors) < 1e-9 and step.weight_error < 1e-9


def test_the_update_on_demonstrations_in_float32() -> None:
    """All problems are unsolved, and without entropy nothing else moves the weights."""
    options = {"entropy_coef": 0.0, "sft_entropy_coef": 0.01}
    trainer = trainer_of(options, solved=(), model={"dtype": "float32"})
    loss = partial(sft, indices=unsolved(trainer), entropy=0.01)
    step = take_step(trainer, [(loss, slice(0, 4), "sft")])
    assert step.gradient_errors[0] < 1e-6
    assert abs(step.losses[0][0] - step.losses[0][1]) < 1e-6 * abs(step.losses[0][1])


def test_below_the_threshold_there_is_no_such_update_and_by_default_it_is_a_batch() -> None:
    trainer = trainer_of({})
    step = take_step(trainer, [(rl, slice(0, 4), "policy")])
    assert step.weight_error < 1e-9
    assert step.metrics["relift/buffer_sum"] == 3  # of 4
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["optim/updates_sum"] == 2 and metrics["relift/buffer_sum"] == 2


def test_units_of_the_published_code_are_those_of_the_rl_update() -> None:
    """There the update on demonstrations is a mean already."""
    options = {"units": "published_code", "entropy_coef": 0.1, "published_micro_batches": 6.0}
    trainer = trainer_of(options | {"buffer_size": 3})
    updates = [
        (partial(rl, entropy=0.1 * 6 / 64), slice(0, 4), "policy"),
        (partial(sft, indices=unsolved(trainer)), slice(0, 4), "sft"),
    ]
    step = take_step(trainer, updates)
    assert max(step.gradient_errors) < 1e-9 and step.weight_error < 1e-9


def test_the_newest_come_first_and_in_their_order() -> None:
    a, b, c, d, e = make_problems(make_tokenizer(), 5)
    buffer = Buffer()
    assert buffer.take(0, [a, b], 3) == []
    assert buffer.take(1, [c, d], 3) == [c, d, a]
    assert buffer.take(2, [a, e], 4) == [] and len(buffer) == 3
    assert buffer.take(3, [b], 4) == [b, a, e, b]  # b is there twice
    assert len(buffer) == 0 and buffer.take(4, [], 1) == []


def test_a_step_that_is_cancelled_leaves_no_trace() -> None:
    """Whether it is repeated in this process or in another one, or was done after all."""
    a, b, c, d = make_problems(make_tokenizer(), 4)
    buffer = Buffer()
    buffer.take(0, [a], 3)
    assert buffer.take(1, [b, c], 3) == [b, c, a]
    assert buffer.take(1, [d, c], 3) == [d, c, a]  # repeated
    resumed = Buffer()
    resumed.restore(json.loads(json.dumps(buffer.state())))
    assert resumed.take(1, [b], 3) == [] and len(resumed) == 2  # step 1 was not done
    resumed.restore(json.loads(json.dumps(buffer.state())))
    assert len(resumed) == 0 and resumed.take(2, [b], 1) == [b]  # it was


def test_problems_without_a_demonstration_do_not_wait() -> None:
    trainer = trainer_of({"buffer_size": 1}, solved=())
    trainer.problems = [
        replace(problem, demonstration=None, demonstration_ids=()) for problem in trainer.problems
    ]
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["relift/buffer_sum"] == 0 and metrics["optim/updates_sum"] == 1


def test_a_resumed_run_is_that_which_was_not_stopped(tmp_path: Path) -> None:
    """Stopped with problems in the buffer, which leave it in the second half."""
    options = {"buffer_size": 4, "sft_lr": 3e-3}
    whole, begun, resumed = (trainer_of(options) for _ in range(3))
    history = [whole.train_step(Interrupt())[0] for _ in range(4)]
    assert [each["relift/buffer_sum"] for each in history] == [3, 2, 1, 0]
    begun.train_step(Interrupt())
    with CheckpointWriter(tmp_path, keep=1, in_background=False) as checkpoints:
        begun.save(checkpoints)
    resumed.restore(list_checkpoints(tmp_path)[-1])
    for _ in range(3):
        resumed.train_step(Interrupt())
    assert largest_difference(resumed.policy.model, whole.policy.model) == 0
    assert resumed.method.state() == whole.method.state()
    begun.train_step(Interrupt())  # to have written a checkpoint is of no consequence
    begun.train_step(Interrupt())
    begun.train_step(Interrupt())
    assert largest_difference(begun.policy.model, whole.policy.model) == 0


def test_a_checkpoint_between_generation_and_update_is_that_of_the_step_before(
    tmp_path: Path, monkeypatch
) -> None:
    """A gap between engine and trainer is found there: the run is saved and ends."""
    options = {"buffer_size": 4}
    whole, begun, resumed = (trainer_of(options) for _ in range(3))
    for _ in range(3):
        whole.train_step(Interrupt())
    begun.train_step(Interrupt())

    def refuse(*args: object) -> None:
        raise LogProbGapError("found before the first update")

    with monkeypatch.context() as patch:
        patch.setattr(begun, "pack", refuse)
        with pytest.raises(LogProbGapError):
            begun.train_step(Interrupt())
    with CheckpointWriter(tmp_path, keep=1, in_background=False) as checkpoints:
        begun.save(checkpoints)
    resumed.restore(list_checkpoints(tmp_path)[-1])
    for trainer in (begun, resumed):
        for _ in range(2):
            trainer.train_step(Interrupt())
        assert largest_difference(trainer.policy.model, whole.policy.model) == 0
        assert trainer.method.state() == whole.method.state()


@pytest.mark.parametrize(
    "fields",
    [{"buffer_size": 0}, {"sft_lr": 0.0}, {"sft_entropy_coef": -1.0}, {"sft_max_grad_norm": 0.0}],
)
def test_fields_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match=f"relift.{next(iter(fields))}: expected"):
        config_from_dict({"relift": fields})
