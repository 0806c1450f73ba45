"""HPT beside its twin: the gate, groups of one row, the norm above which an update is skipped."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.train.interrupt import Interrupt
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, assert_equals_twin, method_trainer
from tests.train.test_update import largest_difference


def twin(now: View, before: View, groups, *, gate=0, sft=1.0, entropy=0.001) -> torch.Tensor:
    """Groups above the gate: sum -A ratio / (N T); others: sft mean(-log p); - entropy mean(H)."""
    policy, likelihoods, entropies = 0.0, [], []
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts]
        if sum(rewards) <= gate:
            log_probs, h = now.demonstration(group.problem)
            likelihoods.append(log_probs)
            entropies.append(h)
            continue
        for rollout in group.rollouts:
            log_probs, h = now.rollout(rollout)
            old, _ = before.rollout(rollout)
            advantage = rollout.reward - sum(rewards) / GROUP_SIZE
            policy = policy - advantage * (log_probs - old.detach()).exp().sum()
            entropies.append(h)
    policy = policy / (len(groups) * GROUP_SIZE * MAX_LENGTH)  # N: what was asked for
    if likelihoods:
        policy = policy - sft * torch.cat(likelihoods).mean()
    return policy - entropy * torch.cat(entropies).mean()


def rule(text: str, problem) -> float:
    """Problem 0 is solved by all rollouts, 1 by none, the others by some."""
    by_problem = {0: True, 1: False}
    return float(by_problem.get(problem.index, sum(map(ord, text)) % 2 == 0))


def numbers_correct(step) -> list[int]:
    return sorted(sum(int(each.reward) for each in group.rollouts) for group in step.groups)


def test_a_step_equals_the_twin() -> None:
    step = assert_equals_twin("hpt", twin, rule=rule)
    assert numbers_correct(step)[0] == 0 < numbers_correct(step)[1]
    assert step.metrics["hpt/replaced_frac"] == 1 / 4
    assert step.metrics["rollout/left_out_frac"] == 1 / 4  # the group's own rollouts


def of_each_number(text: str, problem) -> float:
    """3 rollouts of problem 0 are correct, 1 of 1, 2 of 2, none of 3."""
    code = sum(map(ord, text)) % 4
    return float({0: code == 1, 3: False}.get(problem.index, code == 2))


def test_a_higher_gate_and_both_coefficients() -> None:
    options = {"gate": 1, "sft_coef": 0.3, "entropy_coef": 0.01}
    loss = partial(twin, gate=1, sft=0.3, entropy=0.01)
    step = assert_equals_twin("hpt", loss, options, rule=of_each_number)
    assert numbers_correct(step) == [0, 1, 2, 3]
    assert step.metrics["hpt/replaced_frac"] == 2 / 4


def test_units_of_the_published_code() -> None:
    options = {"units": "published_code", "sft_coef": 0.5, "entropy_coef": 0.02}
    counts = {"published_micro_batches": 6.0, "published_demonstration_micro_batches": 4.0}
    loss = partial(twin, sft=0.5 * 4 / 64, entropy=0.02 * 6 / 64)
    assert_equals_twin("hpt", loss, options | counts, rule=rule)


def test_without_entropy_only_rows_with_a_gradient_are_in_the_update() -> None:
    options = {"entropy_coef": 0.0}
    step = assert_equals_twin("hpt", partial(twin, entropy=0.0), options, rule=rule)
    assert step.metrics["rollout/left_out_frac"] >= 2 / 4  # and those of problem 0


def test_a_problem_without_a_demonstration_is_plain_rl() -> None:
    trainer = method_trainer("hpt")
    trainer.rewarder.rule = lambda text, problem: 0.0
    trainer.problems = [
        replace(problem, demonstration=None, demonstration_ids=()) for problem in trainer.problems
    ]
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["hpt/replaced_frac"] == 0 and metrics["rollout/left_out_frac"] == 0


def one_step(options: dict) -> tuple[dict[str, float], float]:
    """The metrics, and the largest change of a weight."""
    trainer, fresh = method_trainer("hpt", options), method_trainer("hpt", options)
    trainer.rewarder.rule = rule
    metrics, _ = trainer.train_step(Interrupt())
    return metrics, largest_difference(trainer.policy.model, fresh.policy.model)


@pytest.mark.parametrize(
    ("units", "rows", "factor", "is_applied"),
    [
        ("written", 64, 1.01, True),
        ("written", 64, 0.99, False),
        ("published_code", 64, 64 * 1.01, True),
        ("published_code", 64, 64 * 0.99, False),
        ("published_code", 8, 8 * 0.99, False),
    ],
)
def test_an_update_whose_gradient_is_too_long_is_skipped(
    units: str, rows: int, factor: float, is_applied: bool
) -> None:
    coefficients = {"units": units, "published_rows": rows}
    norm = one_step(coefficients | {"skip_norm": None})[0]["optim/grad_norm_mean"]
    metrics, moved = one_step(coefficients | {"skip_norm": norm * factor})
    assert (moved > 0) == is_applied
    assert metrics["optim/skipped_updates_sum"] == (not is_applied)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": -1}, "hpt.gate: expected"),
        ({"gate": 8}, r"hpt.gate: expected below rollout.group_size \(8\), got 8"),
        ({"sft_coef": -0.1}, "hpt.sft_coef: expected"),
        ({"skip_norm": 0.0}, "hpt.skip_norm: expected"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"method": {"name": "hpt"}, "hpt": fields})
