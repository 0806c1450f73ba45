"""SRFT beside its twin, in all three variants."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import Problem
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, assert_equals_twin, method_trainer

equals_twin = partial(assert_equals_twin, "srft", float32_error=3e-6)


def rule(text: str, problem: Problem) -> float:
    """Demonstrations of even problems are right; all rollouts of problem 0, others by luck."""
    if text.startswith(problem.demonstration):
        return float(problem.index % 2 == 0)
    return float(problem.index == 0 or sum(map(ord, text)) % 3 == 0)


def twin(now: View, before: View, groups, *, variant: str, sft=0.5, right=0.1, bonus=0.0, row=None):
    """The formula, a response at a time; H is a number, so that it has no slope."""
    per_row = variant == "upt" if row is None else row
    policy, likelihoods, entropies = 0.0, [], []
    for group in groups:
        *rollouts, demonstration = group.rollouts
        assert len(rollouts) == GROUP_SIZE - (variant == "upt")
        assert not demonstration.is_sampled and all(rollout.is_sampled for rollout in rollouts)
        rewards = torch.tensor([rollout.reward for rollout in group.rollouts]).double()
        for rollout in rollouts:
            log_probs, h = now.rollout(rollout)
            entropies.append(h)
            weight = (h.mean() if per_row else h).detach().exp()
            if rollout.reward == 1:
                policy = policy - (right * weight * log_probs).sum()
            else:
                policy = policy + log_probs.sum()
        log_probs, h = now.demonstration(group.problem)
        entropies.append(h)
        advantage = demonstration.reward - rewards.mean()
        if variant != "upt":
            advantage = advantage / (rewards.std() + 1e-6)
        p = log_probs.exp()
        policy = policy - (advantage * (p if variant == "paper" else p / (p + 0.1))).sum()
        weight_h = (h.mean() if per_row else h).detach()
        weight = sft * (weight_h if variant == "official" else -weight_h).exp()
        likelihoods.append(-weight * log_probs)
    policy = policy / (len(groups) * GROUP_SIZE * MAX_LENGTH)
    return policy + torch.cat(likelihoods).mean() - bonus * torch.cat(entropies).mean()


@pytest.mark.parametrize("variant", ["paper", "official", "upt"])
def test_a_step_equals_the_twin(variant: str) -> None:
    step = equals_twin(partial(twin, variant=variant), {"variant": variant}, rule=rule)
    demonstrations = [group.rollouts[-1] for group in step.groups]
    assert {rollout.reward for rollout in demonstrations} == {0.0, 1.0}  # graded like rollouts
    sampled = [rollout.reward for group in step.groups for rollout in group.rollouts[:-1]]
    assert 0 < sum(sampled) < len(sampled)
    assert step.metrics["rollout/left_out_frac"] == 0  # also groups whose rewards are all equal
    assert step.metrics["reward/demonstration_mean"] == 0.5


def test_every_field_is_where_the_formula_has_it() -> None:
    options = {"sft_coef": 2.0, "correct_coef": 0.7, "entropy_coef": 0.05, "entropy_level": "row"}
    loss = partial(twin, variant="paper", sft=2.0, right=0.7, bonus=0.05, row=True)
    equals_twin(loss, options, rule=rule)
    options = {"variant": "upt", "entropy_level": "token", "units": "published_code"}
    counts = {"published_micro_batches": 6.0, "published_demonstration_micro_batches": 4.0}
    loss = partial(twin, variant="upt", sft=0.5 * 4 / 64, bonus=0.001 * 6 / 64, row=False)
    equals_twin(loss, options | counts | {"entropy_coef": 0.001}, rule=rule)


def test_a_problem_without_a_demonstration_has_rollouts_alone() -> None:
    for variant in ("paper", "upt"):
        trainer = method_trainer("srft", {"variant": variant})
        problem = replace(trainer.problems[1], demonstration=None, demonstration_ids=())
        requests = trainer.method.plan_group(problem, 0)
        assert len(requests) == GROUP_SIZE and len(set(requests)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("variant", "ours"), ("sft_coef", -0.5), ("correct_coef", -0.1), ("entropy_level", "batch")],
)
def test_what_is_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^srft.{name}: expected"):
        config_from_dict({"srft": {name: value}})
