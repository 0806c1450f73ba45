"""LUFFY beside its twin: the missing clip, the graded demonstration, rows without advantage."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.metrics import StepMetrics
from prefix_rft.train.interrupt import Interrupt
from tests.methods.twin import (
    EOS,
    GROUP_SIZE,
    MAX_LENGTH,
    View,
    assert_equals_twin,
    method_trainer,
)


def twin(now: View, before: View, groups, *, gamma=0.1, clip=None, entropy=0.001) -> torch.Tensor:
    """-A ratio on rollouts, -A p / (p + gamma) on demonstrations, summed / (N T); - mean(H)."""
    policy, entropies = 0.0, []
    for group in groups:
        *sampled, whole = group.rollouts
        assert whole.response_ids == (*group.problem.demonstration_ids, EOS)
        assert len(sampled) == GROUP_SIZE - 1
        mean = sum(rollout.reward for rollout in group.rollouts) / GROUP_SIZE
        for rollout in sampled:
            log_probs, h = now.rollout(rollout)
            ratio = (log_probs - before.rollout(rollout)[0].detach()).exp()
            advantage = rollout.reward - mean
            for r in ratio:
                term = -advantage * r
                if clip is not None and (1 - clip > r or r > 1 + clip):
                    bound = 1 - clip if r < 1 else 1 + clip
                    term = torch.maximum(term, term.new_tensor(-advantage * bound))
                policy = policy + term
            entropies.append(h)
        log_probs, h = now.demonstration(group.problem)
        p = log_probs.exp()
        policy = policy - (whole.reward - mean) * (p / (p + gamma)).sum()
        entropies.append(h)
    policy = policy / (len(groups) * GROUP_SIZE * MAX_LENGTH)
    return policy - entropy * torch.cat(entropies).mean()


def some_demonstrations_are_wrong(text: str, problem) -> float:
    """Problem 0 is always solved; the demonstration of 1 is right, of 2 wrong, of 3 by chance."""
    is_demonstration = text == problem.demonstration
    by_problem = {0: True, 1: is_demonstration, 2: not is_demonstration}
    return float(by_problem.get(problem.index, sum(map(ord, text)) % 2 == 0))


def test_a_step_equals_the_twin() -> None:
    step = assert_equals_twin("luffy", twin, rule=some_demonstrations_are_wrong)
    graded = {group.problem.index: group.rollouts[-1] for group in step.groups}
    assert [graded[i].reward for i in range(3)] == [1.0, 1.0, 0.0]
    for group in step.groups:
        assert group.rollouts[-1].text == group.problem.demonstration  # without its end
    mean = sum(rollout.reward for rollout in graded.values()) / 4
    assert step.metrics["reward/demonstration_mean"] == pytest.approx(mean)
    assert step.metrics["rollout/left_out_frac"] == 0  # the entropy term wants every row


@pytest.mark.parametrize("clip", [0.2, 0.01])
def test_the_clip_of_the_paper(clip: float) -> None:
    loss = partial(twin, clip=clip, entropy=0.01)
    rule = some_demonstrations_are_wrong
    assert_equals_twin("luffy", loss, {"clip": clip, "entropy_coef": 0.01}, rule=rule)


def test_the_clip_is_of_consequence() -> None:
    """In the second update of a step some ratios are beyond it."""
    losses = []
    for clip in (None, 0.2):
        trainer = method_trainer("luffy", {"clip": clip}, trainer={"prompts_per_update": 2})
        metrics, _ = trainer.train_step(Interrupt())
        losses.append(metrics["policy/loss_mean"])
    assert losses[0] != losses[1]


def test_a_demonstration_is_graded_without_the_token_that_ends_a_turn() -> None:
    """That token need not be the end of a sequence."""
    trainer = method_trainer("luffy")
    trainer.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    end = trainer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    trainer.method.setting = replace(trainer.method.setting, eos_token_id=end)
    for group in trainer.rollouts(StepMetrics(), Interrupt()):
        whole = group.rollouts[-1]
        assert whole.response_ids[-1] == end and whole.text == group.problem.demonstration


def test_another_gamma_and_the_units_of_the_published_code() -> None:
    options = {"gamma": 0.5, "units": "published_code", "entropy_coef": 0.1}
    loss = partial(twin, gamma=0.5, entropy=0.1 * 6 / 32)
    rule = some_demonstrations_are_wrong
    counts = {"published_micro_batches": 6.0, "published_rows": 32}
    assert_equals_twin("luffy", loss, options | counts, rule=rule)


def test_without_entropy_a_group_without_advantage_is_left_out_its_demonstration_too() -> None:
    loss = partial(twin, entropy=0.0)
    rule = some_demonstrations_are_wrong
    step = assert_equals_twin("luffy", loss, {"entropy_coef": 0.0}, rule=rule)
    assert step.metrics["rollout/left_out_frac"] > 0


def test_a_problem_without_a_demonstration_has_an_ordinary_group() -> None:
    trainer = method_trainer("luffy")
    problem = replace(trainer.problems[1], demonstration=None, demonstration_ids=())
    requests = trainer.method.plan_group(problem, 0)
    assert len(requests) == GROUP_SIZE
    assert all(each.max_new_tokens == MAX_LENGTH and not each.prefix_ids for each in requests)


@pytest.mark.parametrize("fields", [{"gamma": 0.0}, {"clip": 1.5}, {"entropy_coef": -0.1}])
def test_fields_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match=f"luffy.{next(iter(fields))}: expected"):
        config_from_dict({"luffy": fields})
