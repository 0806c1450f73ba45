"""RL with SFT loss beside its twin; its units, and problems without a demonstration."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, assert_equals_twin, method_trainer


def twin(now: View, before: View, groups, *, sft: float = 1.0, entropy: float = 0.001):
    """sum -A ratio / (N T) + sft mean(-log p) over demonstrations - entropy mean(H) over both."""
    policy, likelihoods, entropies = 0.0, [], []
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts]
        for rollout in group.rollouts:
            log_probs, h = now.rollout(rollout)
            old, _ = before.rollout(rollout)
            advantage = rollout.reward - sum(rewards) / len(rewards)
            policy = policy - advantage * (log_probs - old.detach()).exp().sum()
            entropies.append(h)
        if group.problem.demonstration_ids:
            log_probs, h = now.demonstration(group.problem)
            likelihoods.append(log_probs)
            entropies.append(h)
    policy = policy / (len(groups) * GROUP_SIZE * MAX_LENGTH)
    if likelihoods:
        policy = policy - sft * torch.cat(likelihoods).mean()
    return policy - entropy * torch.cat(entropies).mean()


def test_a_step_equals_the_twin() -> None:
    step = assert_equals_twin("rl_sft_loss", twin)
    assert all(len(group.rollouts) == GROUP_SIZE - 1 for group in step.groups)
    assert step.metrics["rollout/left_out_frac"] == 0  # the entropy term wants every row


def test_units_of_the_published_code() -> None:
    """M / R = 6 / 64 for the entropy, M_demo / R = 4 / 64 for the likelihood."""
    options = {"units": "published_code", "sft_coef": 2.0, "entropy_coef": 0.01}
    counts = {"published_micro_batches": 6.0, "published_demonstration_micro_batches": 4.0}
    loss = partial(twin, sft=2.0 * 4 / 64, entropy=0.01 * 6 / 64)
    assert_equals_twin("rl_sft_loss", loss, options | counts)


def test_without_entropy_only_rows_with_a_gradient_are_in_the_update() -> None:
    step = assert_equals_twin("rl_sft_loss", partial(twin, entropy=0.0), {"entropy_coef": 0.0})
    assert step.metrics["rollout/left_out_frac"] > 0


def test_a_problem_without_a_demonstration_has_a_rollout_in_its_place() -> None:
    trainer = method_trainer("rl_sft_loss")
    with_it, without = trainer.problems[0], trainer.problems[1]
    without = replace(without, demonstration=None, demonstration_ids=())
    assert len(trainer.method.plan_group(with_it, 0)) == GROUP_SIZE - 1
    assert len(trainer.method.plan_group(without, 0)) == GROUP_SIZE


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ConfigError, match="rl_sft_loss.sft_coef"):
        config_from_dict({"rl_sft_loss": {"sft_coef": -1.0}})
