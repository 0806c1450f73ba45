"""CHORD beside its twin, in both variants; its schedule; what is left of it without a side."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.methods.grpo import clipped_loss
from tests.methods.twin import GROUP_SIZE, View, assert_equals_twin, method_trainer, take_step

equals_twin = partial(assert_equals_twin, "chord", float32_error=3e-6)
REACHED: list[float] = []  # ratios of tokens with A < 0 that the twin has seen


def twin(now: View, before: View, groups, *, mu=0.9, phi=False, clip=0.2, dual=3.0):
    """(1 - mu) mean over the rollouts' tokens + mu mean over the demonstrations' tokens."""
    policy, likelihoods = [], []
    for group in groups:
        rewards = torch.tensor([rollout.reward for rollout in group.rollouts]).double()
        for rollout in group.rollouts:
            log_probs, old = now.rollout(rollout)[0], before.rollout(rollout)[0].detach()
            advantage = (rollout.reward - rewards.mean()) / (rewards.std() + 1e-6)
            ratio = (log_probs - old).exp()
            value = torch.minimum(ratio * advantage, ratio.clip(1 - clip, 1 + clip) * advantage)
            if advantage < 0:
                REACHED.extend(ratio.tolist())
                value = torch.maximum(value, dual * advantage)
            policy.append(-value)
        if group.problem.demonstration_ids:
            log_probs, _ = now.demonstration(group.problem)
            p = log_probs.exp().detach()
            likelihoods.append(-log_probs * (p * (1 - p) if phi else 1.0))
    loss = (1 - mu) * torch.cat(policy).mean()
    return loss + mu * torch.cat(likelihoods).mean() if likelihoods else loss


def test_a_step_equals_the_twin() -> None:
    step = equals_twin(twin)
    assert step.metrics["chord/mu"] == 0.9
    assert step.metrics["rollout/left_out_frac"] > 0  # dead groups, which count in the mean
    assert all(len(group.rollouts) == GROUP_SIZE for group in step.groups)


def test_phi_weighs_each_token_by_what_has_no_slope() -> None:
    equals_twin(partial(twin, mu=0.1, phi=True), {"variant": "phi"})
    equals_twin(partial(twin, mu=1.0, phi=True), {"variant": "phi", "phi_mu": 1.0})


def test_only_one_side() -> None:
    """mu = 0: no demonstrations in the update; some problems without one: the mean of the rest."""
    equals_twin(
        partial(twin, mu=0.0),
        {"low": 0.0, "high": 0.0},
        rule=lambda text, problem: float(sum(map(ord, text)) % 2),
    )

    def setup(trainer) -> None:
        trainer.problems = [
            replace(problem, demonstration=None, demonstration_ids=()) if k else problem
            for k, problem in enumerate(trainer.problems)
        ]

    equals_twin(partial(twin, mu=0.5), {"low": 0.5, "high": 0.5}, setup=setup)


def test_the_dual_clip_is_reached_and_equals_the_twin() -> None:
    """A large first update makes ratios above 3 in the second."""
    REACHED.clear()
    trainer = method_trainer(
        "chord",
        {"low": 0.1, "high": 0.1},
        trainer={"prompts_per_update": 2, "micro_batch_tokens": 60},
        optimizer={"lr": 0.2},
    )
    loss = partial(twin, mu=0.1)
    step = take_step(trainer, [(loss, slice(0, 2), "policy"), (loss, slice(2, 4), "policy")])
    assert sum(ratio > 3 for ratio in REACHED) > 2 and sum(0.1 < x < 0.8 for x in REACHED) > 3
    for ours, expected in step.losses:
        assert ours == pytest.approx(expected, rel=1e-9)
    assert max(step.gradient_errors) < 1e-9


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.3, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (2.0, -2.0, 4.0, 4.0),
        (3.5, -2.0, 6.0, 0.0),
    ],
)
def test_each_branch_of_the_clip(ratio, advantage, loss, slope) -> None:
    log_probs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1).double(), torch.tensor([advantage]).double()
    value = clipped_loss(log_probs, old, advantages, clip=0.2, dual_clip=3.0)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert log_probs.grad.item() == pytest.approx(slope)


def test_mu_falls_on_a_cosine_over_two_fifths_of_the_run() -> None:
    method = method_trainer("chord", trainer={"num_steps": 500}).method
    steps = (0, 50, 100, 150, 200, 499)
    expected = [0.05 + 0.425 * (1 + math.cos(math.pi * min(t / 200, 1))) for t in steps]
    assert [method.schedule(t)["chord/mu"] for t in steps] == pytest.approx(expected)
    phi = method_trainer("chord", {"variant": "phi"}).method
    assert [phi.schedule(t)["chord/mu"] for t in (0, 9)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("variant", "psi"), ("high", 1.1), ("low", -0.1), ("phi_mu", 2.0), ("dual_clip", 1.0)],
)
def test_what_is_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^chord.{name}: expected"):
        config_from_dict({"chord": {name: value}})
