"""Options of prefix_rft beside a twin: the paper's ablations, and what others do with prefixes."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import RolloutRequest
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.train.interrupt import Interrupt
from tests.methods.twin import GROUP_SIZE, MAX_LENGTH, View, assert_equals_twin, method_trainer


def kept(entropies, fraction: str, order: str) -> set[tuple[int, int]]:
    """The tokens (row, place) of a pool {token: entropy} that are selected; ties: the earlier."""
    sign = -1 if order == "high" else 1
    pool = sorted((sign * h, token) for token, h in entropies.items())
    return {
        token for _, token in pool[: len(pool) - math.floor(len(pool) * (1 - Fraction(fraction)))]
    }


def twin(now: View, before: View, groups, *, fraction="1/5", order="high", on="prefix"):
    """Dr. GRPO over the sampled tokens, and over the selected ones of the prefixes."""
    rows = []
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts]
        assert len(rewards) == GROUP_SIZE
        if len(set(rewards)) > 1:
            rows += [(each, each.reward - sum(rewards) / GROUP_SIZE) for each in group.rollouts]
    prefixes, continuations = {}, {}
    for b, (rollout, _) in enumerate(rows):
        for t, h in enumerate(now.rollout(rollout)[1].tolist()):
            (prefixes if t < rollout.prefix_length else continuations)[b, t] = h
    tokens = kept(prefixes, fraction, order)
    tokens |= kept(continuations, fraction, order) if on == "response" else continuations.keys()
    total = torch.zeros((), dtype=torch.float64)
    for b, (rollout, advantage) in enumerate(rows):
        log_probs, old = now.rollout(rollout)[0], before.rollout(rollout)[0].detach()
        ratio = (log_probs - old).exp()
        losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        total = total + sum(losses[t] for t in range(len(losses)) if (b, t) in tokens)
    return total / (len(groups) * GROUP_SIZE * MAX_LENGTH)


TWO = {"num_hybrid": 2}  # of 4, for more prefix tokens
equals_twin = partial(assert_equals_twin, "prefix_rft", float32_error=3e-6)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"selection_fraction": 0.5}, {"fraction": "1/2"}),
        ({"selection_fraction": 1.0}, {"fraction": "1"}),
        ({"selection_order": "low"}, {"order": "low"}),
        ({"schedule": "uniform"}, {}),
        ({"selection_on": "response"}, {"on": "response"}),
        ({"shared_prefix": True}, {}),
    ],
    ids=str,
)
def test_an_ablation_equals_the_twin(options: dict, changes: dict) -> None:
    step = equals_twin(partial(twin, **changes), TWO | options)
    assert step.metrics["prefix/groups_frac"] == 1
    assert step.metrics["reward/hybrid_mean"] >= 0 and step.metrics["reward/on_policy_mean"] >= 0
    if "shared_prefix" in options:
        prefixes = [{each.prefix_length for each in group.rollouts[2:]} for group in step.groups]
        assert [len(lengths) for lengths in prefixes] == [1] * 4


def test_a_frozen_prefix_is_context_and_costs_no_pass_for_entropies() -> None:
    frozen = TWO | {"selection_fraction": 0.0}
    step = equals_twin(partial(twin, fraction="0"), frozen)
    assert step.metrics["policy/kept_frac"] == 0
    assert "policy/prefix_entropy_mean" not in step.metrics  # nobody knows it

    trainer = method_trainer("prefix_rft", frozen)
    asked = []
    trainer.policy.token_stats = asked.append
    trainer.train_step(Interrupt())
    assert asked == []


def test_all_rollouts_from_one_masked_prefix() -> None:
    options = {"num_hybrid": GROUP_SIZE, "shared_prefix": True, "selection_fraction": 0.0}
    step = equals_twin(partial(twin, fraction="0"), options)
    for group in step.groups:
        (length,) = {rollout.prefix_length for rollout in group.rollouts}
        assert length > 0
    assert "reward/on_policy_mean" not in step.metrics
    assert step.metrics["reward/hybrid_mean"] == step.metrics["reward/mean"]


def test_a_random_selection_has_as_many_tokens_and_is_another_one() -> None:
    def selected(order: str) -> list[bool]:
        trainer = method_trainer("prefix_rft", TWO | {"selection_order": order})
        prepare, seen = trainer.method.prepare, []

        def recorded(*args):
            seen.append(prepare(*args))
            return seen[0]

        trainer.method.prepare = recorded
        trainer.train_step(Interrupt())
        return seen[0].selected_mask.tolist()

    high, random = selected("high"), selected("random")
    assert sum(high) == sum(random) > 1
    assert high != random == selected("random")


def fails_by_problem(text: str, problem) -> float:
    """Problem 1 never without the start of its demonstration; the others by luck, 0 more often."""
    luck = sum(map(ord, text))
    if problem.index == 1:
        return float(text[:1] == "1" and luck % 2)
    return float(luck % (2 if problem.index == 0 else 3) == 0)


def test_a_prefix_only_where_the_ordinary_rollouts_fail() -> None:
    options = TWO | {"when": "group_fails"}
    step = equals_twin(twin, options, rule=fails_by_problem)
    with_prefix = []
    for group in step.groups:
        first, rest = group.rollouts[:2], group.rollouts[2:]
        assert len(rest) == 2 and not any(rollout.is_hybrid for rollout in first)
        failed = not any(rollout.reward for rollout in first)
        assert [rollout.is_hybrid for rollout in rest] == [failed] * 2
        with_prefix.append(failed)
    assert 0 < sum(with_prefix) < len(with_prefix)
    assert step.metrics["prefix/groups_frac"] == sum(with_prefix) / 4


def test_a_group_that_may_not_fail_costs_as_many_rollouts_without_a_demonstration() -> None:
    trainer = method_trainer("prefix_rft", TWO | {"when": "group_fails"})
    without = replace(trainer.problems[1], demonstration=None, demonstration_ids=())
    trainer.problems = [without]
    (group, *_) = trainer.sampler.groups(
        [without] * 4, 0, trainer.policy, StepMetrics(), Interrupt()
    )
    assert [rollout.is_hybrid for rollout in group.rollouts] == [False] * GROUP_SIZE


def test_hybrids_are_as_likely_as_where_they_always_come() -> None:
    """The same draws, behind as many ordinary rollouts."""
    always, fails = (
        method_trainer("prefix_rft", TWO | {"when": when}).method
        for when in ("always", "group_fails")
    )
    trainer = method_trainer("prefix_rft", TWO | {"when": "group_fails"})
    trainer.rewarder.rule = lambda text, problem: 0.0
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    for group in groups:
        first = fails.plan_group(group.problem, 0)
        assert first + fails.plan_rest(group, 0) == always.plan_group(group.problem, 0)


@pytest.mark.parametrize("num_hybrid", [0, 1, 3])
def test_the_default_draws_a_ratio_for_each_hybrid_from_the_last_place_on(num_hybrid: int) -> None:
    trainer = method_trainer("prefix_rft", {"num_hybrid": num_hybrid})
    ordinary = RolloutRequest(prompt_ids=trainer.problems[2].prompt_ids, max_new_tokens=MAX_LENGTH)
    for step in (0, 3):
        expected = [ordinary] * GROUP_SIZE
        rng = np.random.default_rng([0, step, 2])
        low = 0.05 + 0.5 * (0.95 - 0.05) * (1 + math.cos(math.pi * step / 10))
        ids = trainer.problems[2].demonstration_ids
        for k in range(num_hybrid):
            length = min(max(1, math.floor(rng.uniform(low, 0.95) * len(ids))), len(ids) - 1)
            expected[-1 - k] = RolloutRequest(
                prompt_ids=ordinary.prompt_ids,
                prefix_ids=ids[:length],
                max_new_tokens=MAX_LENGTH - length,
            )
        assert trainer.method.plan_group(trainer.problems[2], step) == expected


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"num_hybrid": 9}, 8),
        ({"num_hybrid": 8, "advantage": "exclude_hybrid"}, 7),
        ({"num_hybrid": 8, "when": "group_fails"}, 7),
    ],
)
def test_a_group_that_cannot_be_formed_is_refused(options: dict, bound: int) -> None:
    with pytest.raises(ConfigError, match=f"^prefix_rft.num_hybrid: expected at most {bound}, "):
        config_from_dict({"prefix_rft": options, "rollout": {"group_size": 8}})
    allowed = {"prefix_rft": options | {"num_hybrid": bound}, "rollout": {"group_size": 8}}
    assert config_from_dict(allowed).prefix_rft.num_hybrid == bound


@pytest.mark.parametrize(
    ("name", "value"),
    [("when", "never"), ("selection_on", "all"), ("shared_prefix", 1), ("selection_fraction", 1.5)],
)
def test_what_is_no_option_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^prefix_rft.{name}: expected"):
        config_from_dict({"prefix_rft": {name: value}})
