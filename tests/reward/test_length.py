"""The over-length penalty against Eq. 13 of DAPO, alone and in a step."""

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.reward.length import overlong_penalty
from prefix_rft.train.interrupt import Interrupt
from tests.tiny import make_trainer


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0.0), (15, 0.0), (16, 0.0), (17, 0.25), (18, 0.5), (19, 0.75), (20, 1.0)],
)
def test_the_last_tokens_cost_in_proportion(length: int, expected: float) -> None:
    """L_max = 20, L_cache = 4: 0 to 16 tokens, (length - 16) / 4 from there on."""
    options = {"max_response_length": 20, "overlong_tokens": 4}
    assert overlong_penalty(length, **options, penalty=1.0) == expected
    assert overlong_penalty(length, **options, penalty=0.5) == expected / 2
    assert overlong_penalty(length, **options, penalty=0.0) == 0


def test_without_a_span_nothing_is_taken() -> None:
    assert overlong_penalty(20, max_response_length=20, overlong_tokens=0, penalty=1.0) == 0


@pytest.mark.parametrize("tokens", [0, 6])
def test_a_step_takes_it_off_rewards_alone(tokens: int) -> None:
    """Of 12 tokens the last 6 cost up to 0.5; hybrids by their whole length, status untouched."""
    trainer = make_trainer(
        {
            "rollout": {"group_size": 4, "max_response_length": 12},
            "trainer": {"prompts_per_step": 4, "prompts_per_update": 4, "num_steps": 5},
            "reward": {"overlong_tokens": tokens, "overlong_penalty": 0.5},
        }
    )
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    metrics, _ = trainer.train_step(Interrupt())
    rollouts = [(rollout, group.problem) for group in groups for rollout in group.rollouts]
    assert any(rollout.is_hybrid and len(rollout.response_ids) > 6 for rollout, _ in rollouts)
    lost = []
    for rollout, problem in rollouts:
        plain = trainer.rewarder.rule(rollout.text, problem)
        lost.append(0.5 * max(0, len(rollout.response_ids) - 6) / 6 if tokens else 0.0)
        assert rollout.reward == plain - lost[-1]
        assert rollout.status == ("correct" if plain else "wrong")
    assert (max(lost) == 0.5) == bool(tokens)
    taken = pytest.approx(sum(lost) / len(lost)) if tokens else None
    assert metrics.get("reward/overlong_penalty_mean") == taken
    rewards = [rollout.reward for rollout, _ in rollouts]
    assert metrics["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))


def test_what_the_policy_did_not_write_loses_nothing() -> None:
    """A demonstration that is graded as it stands, of the full length."""
    trainer = make_trainer(
        {
            "rollout": {"group_size": 2, "max_response_length": 12},
            "trainer": {"prompts_per_step": 1, "prompts_per_update": 1, "num_steps": 5},
            "reward": {"overlong_tokens": 11},
        }
    )
    plan_group = trainer.method.plan_group
    trainer.method.plan_group = lambda problem, step: [
        type(request)(
            prompt_ids=request.prompt_ids, prefix_ids=problem.demonstration_ids, max_new_tokens=k
        )
        for k, request in enumerate(plan_group(problem, step))
    ]
    trainer.rewarder.rule = lambda text, problem: 1.0
    [group] = trainer.rollouts(StepMetrics(), Interrupt())
    demonstration, continued = group.rollouts
    assert len(demonstration.response_ids) > 1 and demonstration.reward == 1
    assert continued.reward == 1 - (len(continued.response_ids) - 1) / 11


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"overlong_tokens": 16}, r"reward.overlong_tokens: expected below rollout.max_resp.*16"),
        ({"overlong_tokens": -1}, "reward.overlong_tokens: expected a whole number of at least 0"),
        ({"overlong_penalty": -0.5}, "reward.overlong_penalty: expected a number of at least 0"),
    ],
)
def test_a_span_or_a_penalty_out_of_range_is_refused(section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"rollout": {"max_response_length": 16}, "reward": section})
    config_from_dict({"rollout": {"max_response_length": 16}, "reward": {"overlong_tokens": 15}})
