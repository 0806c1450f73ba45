"""Groups without an advantage are replaced by those of other problems, the same on all ranks."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data.problems import batch_indices
from prefix_rft.data_types import Completion, Group, Problem, RolloutRequest
from prefix_rft.methods.rft import RFT
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.model.distributed import World
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.sampler import stand_ins
from prefix_rft.train.trainer import Trainer
from tests.tiny import make_trainer

NUM_PROBLEMS, GROUP_SIZE = 12, 3
ORDER = batch_indices(NUM_PROBLEMS, 4, 0, seed=0)
OTHERS = stand_ins(NUM_PROBLEMS, ORDER, 0, seed=0)
ALIVE = {ORDER[0], OTHERS[1], OTHERS[3]}  # the problems whose rewards differ

Rule = Callable[[str, Problem], float | None]


class Ranks:
    """What the ranks of one test, each a thread, tell each other."""

    def __init__(self, size: int) -> None:
        self.size, self.items = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)  # broken where one rank asks more often


class ThreadWorld(World):
    """The rank of one thread."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        super().__init__()
        self.rank, self.size, self.ranks = rank, ranks.size, ranks

    def all_gather_object(self, item):
        self.ranks.items[self.rank] = item
        self.ranks.barrier.wait()
        items = list(self.ranks.items)
        self.ranks.barrier.wait()
        return items


class CountingEngine:
    """Completions of 2, 3, 4 ... tokens for each prompt of a call; ranks wait for each other."""

    is_collective, shares_module, weights_version = True, False, None

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.calls: list[tuple[int, int]] = []  # (seed, number of requests)

    def update_weights(self, model, version: int) -> None:
        self.weights_version = version

    def sleep(self) -> None: ...

    def generate(
        self, requests: Sequence[RolloutRequest], *, seed: int, on_done, **_
    ) -> list[Completion]:
        self.calls.append((seed, len(requests)))
        if self.ranks is not None:
            self.ranks.barrier.wait()
        seen: Counter = Counter()
        completions = []
        for i, request in enumerate(requests):
            seen[request.prompt_ids] += 1
            length = 1 + seen[request.prompt_ids]
            completions.append(
                Completion(
                    token_ids=(2,) * length, log_probs=(-1.0,) * length, finish_reason="stop"
                )
            )
            on_done(i, completions[-1])
        return completions


def alive_rule(text: str, problem: Problem) -> float:
    return float(problem.index in ALIVE and len(text) == 2)


def sampling_trainer(
    num_rounds: int, *, method: str = "rft", rule: Rule = alive_rule, **reward: object
) -> Trainer:
    trainer = make_trainer(
        {
            "rollout": {
                "group_size": GROUP_SIZE,
                "max_response_length": 8,
                "resample_groups": num_rounds,
            },
            "trainer": {"prompts_per_step": 4, "prompts_per_update": 4, "num_steps": 5},
            "method": {"name": method},
            "reward": reward,
        },
        num_problems=NUM_PROBLEMS,
    )
    trainer.rewarder.rule = rule
    trainer.sampler.engine = CountingEngine()
    return trainer


def sample(trainer: Trainer, step: int = 0) -> tuple[list[Group], dict[str, float]]:
    step_metrics = StepMetrics()
    groups = trainer.sampler.groups(
        trainer.problems, step, trainer.policy, step_metrics, Interrupt(trainer.sampler.world)
    )
    return groups, step_metrics.result()


def indices(groups: Sequence[Group]) -> list[int]:
    return [group.problem.index for group in groups]


def test_stand_ins_are_all_other_problems_in_an_order_of_the_step() -> None:
    assert sorted([*ORDER, *OTHERS]) == list(range(NUM_PROBLEMS))
    assert OTHERS == stand_ins(NUM_PROBLEMS, ORDER, 0, seed=0) != sorted(OTHERS)
    assert OTHERS != stand_ins(NUM_PROBLEMS, ORDER, 1, seed=0)
    assert OTHERS != stand_ins(NUM_PROBLEMS, ORDER, 0, seed=1)
    assert stand_ins(3, [2, 0, 1, 2], 0, seed=0) == []


@pytest.mark.parametrize(
    ("num_rounds", "expected", "num_drawn"),
    [
        (0, ORDER, None),
        # Three groups are dead; of the three stand-ins the second is not, and takes its place.
        (1, [ORDER[0], ORDER[1], OTHERS[1], ORDER[3]], 3),
        # Then two are; of the next two stand-ins the first is not.
        (2, [ORDER[0], OTHERS[3], OTHERS[1], ORDER[3]], 5),
        # Then one is, for which no other does, until there are none left.
        (16, [ORDER[0], OTHERS[3], OTHERS[1], ORDER[3]], 8),
    ],
)
def test_groups_without_an_advantage_are_replaced(num_rounds, expected, num_drawn) -> None:
    groups, metrics = sample(sampling_trainer(num_rounds))
    assert indices(groups) == expected
    assert metrics.get("rollout/resampled_groups_sum") == num_drawn
    num_replaced = sum(index in OTHERS for index in expected)
    assert metrics.get("rollout/replaced_groups_sum") == (num_replaced if num_rounds else None)
    assert all(len(group.rollouts) == GROUP_SIZE for group in groups)


def test_what_is_dropped_was_generated_and_is_measured() -> None:
    """9 groups of 2 + 3 + 4 tokens; 3 of the 27 rollouts have a reward; of 4 groups 1 is dead."""
    trainer = sampling_trainer(2)
    trainer.config = replace(
        trainer.config, rollout=replace(trainer.config.rollout, max_log_prob_gap=None)
    )
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["rollout/generated_tokens_sum"] == 9 * (2 + 3 + 4)
    assert metrics["rollout/response_length_mean"] == 3
    assert metrics["reward/mean"] == pytest.approx(3 / 27)
    assert metrics["grader/correct_sum"] == 3 and metrics["grader/wrong_sum"] == 24
    assert metrics["reward/zero_std_frac"] == 1 / 4
    assert metrics["rollout/left_out_frac"] == 3 / 12  # of what the update could have had


def test_rounds_have_seeds_of_their_own_and_the_first_those_it_always_had() -> None:
    plain, resampled = sampling_trainer(0), sampling_trainer(16)
    sample(plain, 3)
    sample(resampled, 3)
    calls = resampled.sampler.engine.calls
    assert plain.sampler.engine.calls == calls[:1] == [(3, 4 * GROUP_SIZE)]
    seeds = [seed for seed, _ in calls]
    assert len(calls) > 2 and len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32  # else a round had the seed of another run


def test_later_steps_see_what_they_would_have_seen() -> None:
    trainer = sampling_trainer(1, rule=lambda text, problem: 0.0)
    for step in range(4):
        groups, metrics = sample(trainer, step)
        assert indices(groups) == batch_indices(NUM_PROBLEMS, 4, step, seed=0)
        assert metrics["rollout/resampled_groups_sum"] == 4
        assert metrics["rollout/replaced_groups_sum"] == 0


def test_nothing_is_resampled_where_all_groups_have_an_advantage() -> None:
    trainer = sampling_trainer(3, rule=lambda text, problem: float(len(text)))
    groups, metrics = sample(trainer)
    assert indices(groups) == ORDER and len(trainer.sampler.engine.calls) == 1
    assert metrics["rollout/resampled_groups_sum"] == 0


def test_a_group_left_with_one_reward_has_no_advantage() -> None:
    def one_reward(text: str, problem: Problem) -> float | None:
        first_only = problem.index == ORDER[1] and len(text) > 2
        return None if first_only else float(len(text))

    groups, metrics = sample(sampling_trainer(1, rule=one_reward, allow_none=True))
    assert indices(groups) == [ORDER[0], OTHERS[0], ORDER[2], ORDER[3]]
    assert metrics["grader/no_reward_frac"] == 2 / (5 * GROUP_SIZE)


def test_a_method_that_asks_for_nothing_is_left_alone() -> None:
    trainer = sampling_trainer(3, method="sft")
    groups, metrics = sample(trainer)
    assert indices(groups) == ORDER and not trainer.sampler.engine.calls
    assert "rollout/resampled_groups_sum" not in metrics


class Graded(RFT):
    """The demonstration is graded beside the rollouts; one problem has no sequences at all."""

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        demonstration = RolloutRequest(
            prompt_ids=problem.prompt_ids, prefix_ids=problem.demonstration_ids, max_new_tokens=0
        )
        plan = [*super().plan_group(problem, step), demonstration]
        return [] if problem.index == ORDER[2] else plan


def test_dead_is_a_group_whose_own_rollouts_are_alike_and_that_has_some() -> None:
    """Neither the reward of a demonstration nor a group that was not asked for is looked at."""
    trainer = sampling_trainer(1, rule=lambda text, problem: float("=" in text))
    trainer.sampler.method = Graded(None, trainer.method.setting)
    groups, metrics = sample(trainer)
    assert indices(groups) == ORDER
    assert metrics["rollout/resampled_groups_sum"] == 3


class OneMore(RFT):
    """Where every rollout fails one is added, for problems of an even index."""

    def plan_rest(self, group: Group, step: int) -> list[RolloutRequest]:
        failed = not any(rollout.reward for rollout in group.rollouts)
        return self.plan_group(group.problem, step)[:1] if failed and self.asks(group) else []

    def asks(self, group: Group) -> bool:
        return group.problem.index % 2 == 0


@pytest.mark.parametrize("size", [2, 3])
def test_the_groups_are_the_same_on_any_number_of_ranks(size: int) -> None:
    """A rank that asked the engine, or the others, once more or less would break the barrier."""

    def make(num_rounds: int = 16) -> Trainer:
        trainer = sampling_trainer(num_rounds)
        trainer.sampler.method = OneMore(None, trainer.method.setting)
        return trainer

    alone, metrics = sample(make())
    ranks = Ranks(size)

    def run(rank: int):
        trainer = make()
        trainer.sampler.world = ThreadWorld(rank, ranks)
        trainer.sampler.engine = CountingEngine(ranks)
        groups, metrics = sample(trainer)
        return groups, metrics, trainer.sampler.engine.calls

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(run, range(size)))
    for groups, its_metrics, _ in found:
        assert groups == alone
        for name, value in metrics.items():
            assert name.startswith("time/") or its_metrics[name] == value, name
    calls = [calls for _, _, calls in found]
    assert len(calls[0]) > 4 and len({len(each) for each in calls}) == 1
    seeds = [seed for each in calls for seed, _ in each]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("value", [-1, 17, 1.5])
def test_a_number_of_rounds_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="rollout.resample_groups: expected a whole number in"):
        config_from_dict({"rollout": {"resample_groups": value}})
