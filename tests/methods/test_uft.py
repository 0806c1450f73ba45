"""UFT beside its twin; how long its hints are, and until when; what keeps a row in the update."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import Problem
from prefix_rft.model import Policy
from tests.methods.twin import (
    GROUP_SIZE,
    MAX_LENGTH,
    TEMPERATURE,
    VOCAB_SIZE,
    View,
    assert_equals_twin,
    method_trainer,
)
from tests.tiny import make_model, make_tokenizer

HALF = {"low": 0.5, "high": 0.5}  # half of the parts, for hints of all lengths
REFERENCE = View(make_model(VOCAB_SIZE, seed=1).double())


def several_lines(problem: Problem, text: str = "go\n{0}+{0}\n\n={1}\n") -> Problem:
    """With a demonstration of 3 lines that are not empty."""
    demonstration = text.format(problem.index, problem.answer)
    ids = make_tokenizer()(demonstration, add_special_tokens=False)["input_ids"]
    return replace(problem, demonstration=demonstration, demonstration_ids=tuple(ids))


def setup(trainer) -> None:
    """Demonstrations of several lines; the log-probs of another model as those of a reference."""
    trainer.problems = [several_lines(problem) for problem in trainer.problems]
    model = make_model(VOCAB_SIZE, seed=1).to(trainer.policy.model.dtype)
    reference = Policy(model, temperature=TEMPERATURE, vocab_size=VOCAB_SIZE)
    pack = trainer.pack

    def pack_with_reference(mini_batch, step_metrics):
        batch = pack(mini_batch, step_metrics)
        return replace(batch, ref_log_probs=reference.token_stats(batch).log_probs)

    trainer.pack = pack_with_reference


def twin(now: View, before: View, groups, *, nll=0.001, entropy=0.001, kl=0.001, clip=0.2):
    """Four token means: clipped GRPO, entropy and k3 over what was sampled, -log p over hints."""
    policy, hints, entropies, divergences = [], [], [], []
    for group in groups:
        rewards = torch.tensor([rollout.reward for rollout in group.rollouts]).double()
        for rollout in group.rollouts:
            log_probs, h = now.rollout(rollout)
            old = before.rollout(rollout)[0].detach()
            reference = REFERENCE.rollout(rollout)[0].detach()
            sampled = torch.arange(len(log_probs)) >= rollout.prefix_length
            advantage = (rollout.reward - rewards.mean()) / (rewards.std() + 1e-6)
            ratio = (log_probs - old).exp()[sampled]
            clipped = torch.minimum(ratio * advantage, ratio.clip(1 - clip, 1 + clip) * advantage)
            policy.append(-clipped)
            hints.append(-log_probs[~sampled])
            entropies.append(h[sampled])
            d = (log_probs - reference)[sampled]
            divergences.append((-d).exp() + d - 1)
    loss = torch.cat(policy).mean() - entropy * torch.cat(entropies).mean()
    loss = loss + kl * torch.cat(divergences).mean()
    return loss + nll * torch.cat(hints).sum() / max(1, sum(map(len, hints)))


def test_a_step_equals_the_twin() -> None:
    step = assert_equals_twin("uft", twin, HALF, setup=setup)
    dead = [group for group in step.groups if len({r.reward for r in group.rollouts}) == 1]
    assert any(group.rollouts[0].is_hybrid for group in dead)
    assert step.metrics["rollout/left_out_frac"] == 0  # dead groups have the other three terms
    lengths = [{rollout.prefix_length for rollout in group.rollouts} for group in step.groups]
    assert all(len(shared) == 1 for shared in lengths) and len(set().union(*lengths)) > 1
    assert step.metrics["policy/hint_nll_mean"] > 0 and step.metrics["policy/ref_kl_mean"] > 0


def test_every_coefficient_and_the_clip_are_where_the_formula_has_them() -> None:
    options = {"nll_coef": 0.5, "entropy_coef": 0.2, "kl_coef": 0.3, "clip": 0.01}
    loss = partial(twin, nll=0.5, entropy=0.2, kl=0.3, clip=0.01)
    assert_equals_twin("uft", loss, HALF | options, setup=setup)


def test_without_the_other_terms_dead_groups_are_left_out_but_count_in_the_mean() -> None:
    off = {"entropy_coef": 0.0, "kl_coef": 0.0, "nll_coef": 0.0}
    loss = partial(twin, nll=0.0, entropy=0.0, kl=0.0)
    step = assert_equals_twin("uft", loss, HALF | off, setup=setup)
    assert step.metrics["rollout/left_out_frac"] > 0
    assert not method_trainer("uft", off).method.uses_reference
    assert method_trainer("uft").method.uses_reference


def test_a_hint_keeps_a_dead_group_in_the_update() -> None:
    off = {"entropy_coef": 0.0, "kl_coef": 0.0, "nll_coef": 0.1}
    loss = partial(twin, nll=0.1, entropy=0.0, kl=0.0)
    assert_equals_twin("uft", loss, HALF | off, setup=setup)


def test_probabilities_count_from_1_and_end_at_the_horizon() -> None:
    """Of 500 steps: .05 + .45 (1 + cos(pi t / 300)) in step t, from 1; nothing from t = 300 on."""
    method = method_trainer("uft", trainer={"num_steps": 500}).method
    for t in (1, 2, 150, 299):
        expected = 0.05 + 0.45 * (1 + math.cos(math.pi * t / 300))
        assert method.schedule(t - 1)["hint/probability"] == pytest.approx(expected, abs=1e-12)
    assert [method.schedule(t - 1)["hint/probability"] for t in (300, 301, 500)] == [0.0] * 3
    fixed = method_trainer("uft", {"horizon_steps": 4}, trainer={"num_steps": 500}).method
    assert fixed.schedule(1)["hint/probability"] == pytest.approx(0.5)
    assert fixed.schedule(3)["hint/probability"] == 0.0


def plans(trainer, problem: Problem, steps) -> list[int]:
    """The lengths of the hints, after a look at the requests."""
    lengths = []
    for step in steps:
        requests = trainer.method.plan_group(problem, step)
        assert len(requests) == GROUP_SIZE and len(set(requests)) == 1
        hint = requests[0].prefix_ids
        assert hint == problem.demonstration_ids[: len(hint)]
        assert requests[0].max_new_tokens == MAX_LENGTH - len(hint)
        lengths.append(len(hint))
    return lengths


def test_chunks_are_draws_of_the_probability_and_cut_at_equal_fractions_of_the_tokens() -> None:
    # The first 4,000 of 10,000,000 steps have p = .95 to 1e-5.
    trainer = method_trainer("uft", trainer={"num_steps": 10_000_000})
    problem = several_lines(trainer.problems[1])  # 11 tokens in 3 chunks
    assert len(problem.demonstration_ids) == 11
    lengths = plans(trainer, problem, range(4000))
    assert set(lengths) <= {0, 3, 7, 11}
    chunks = torch.tensor([{0: 0, 3: 1, 7: 2, 11: 3}[n] for n in lengths]).double()
    assert chunks.mean() == pytest.approx(3 * 0.95, abs=4 * (3 * 0.95 * 0.05 / 4000) ** 0.5)
    assert chunks.var() == pytest.approx(3 * 0.95 * 0.05, rel=0.15)  # draws of their own
    assert lengths[:50] == plans(trainer, problem, range(50))  # of seed, step and problem alone
    assert lengths[:200] != plans(trainer, several_lines(trainer.problems[2]), range(200))


def test_a_demonstration_has_no_more_chunks_than_lines_and_no_more_than_five() -> None:
    trainer = method_trainer("uft", {"low": 1.0, "high": 1.0, "max_chunks": 5})
    half = method_trainer("uft", HALF, trainer={"num_steps": 1000}).method
    one = several_lines(trainer.problems[1], "1+1={0}")
    seven = several_lines(trainer.problems[1], "\n".join("abcdefg"))
    for problem, cuts in ((one, {0, 5}), (seven, {0, 2, 5, 7, 10, 13})):
        steps = range(100)
        seen = {len(half.plan_group(problem, step)[0].prefix_ids) for step in steps}
        assert seen == cuts


def test_a_hint_leaves_room_for_a_token() -> None:
    trainer = method_trainer("uft", {"low": 1.0, "high": 1.0})
    long = several_lines(trainer.problems[1], "+" * MAX_LENGTH)
    (length,) = plans(trainer, long, [0])
    assert length == MAX_LENGTH - 1


def test_no_demonstration_no_hint() -> None:
    trainer = method_trainer("uft", {"low": 1.0, "high": 1.0})
    problem = replace(trainer.problems[1], demonstration=None, demonstration_ids=())
    assert plans(trainer, problem, [0]) == [0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nll_coef", -1.0),
        ("entropy_coef", -1.0),
        ("kl_coef", -0.1),
        ("clip", 1.0),
        ("low", 0.96),
        ("high", 1.1),
        ("max_chunks", 0),
        ("horizon_steps", -1),
    ],
)
def test_what_is_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^uft.{name}: expected"):
        config_from_dict({"uft": {name: value}})
