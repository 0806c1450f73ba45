"""What the trainer does for a method, by one that asks for everything that the interface offers."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, Segment, TrainRow
from prefix_rft.methods import METHODS, Figure, Method, TokenLoss, find_method, register
from prefix_rft.methods.registry import declared_charts
from prefix_rft.metrics.progress import describe
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.train.checkpoint import CheckpointWriter, list_checkpoints
from prefix_rft.train.interrupt import Interrupt
from tests.tiny import make_tokenizer, make_trainer
from tests.train.test_update import apply_update, largest_difference

VOCAB_SIZE = len(make_tokenizer())
NUM_ROLLOUTS, MAX_LENGTH = 3, 24
CONFIG = {
    "method": {"name": "tests.methods.test_method:Probe"},
    "model": {"dtype": "float64"},
    "rollout": {"group_size": NUM_ROLLOUTS, "max_response_length": MAX_LENGTH},
    "optimizer": {"lr": 1e-2, "eps": 1e-4, "max_grad_norm": 100.0},
    "trainer": {"num_steps": 4, "prompts_per_step": 4, "prompts_per_update": 2},
}


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    yield
    METHODS.pop(Probe.name, None)


def ratio_loss(log_probs, entropy, old_log_probs, advantages):
    ratio = (log_probs - old_log_probs).exp()
    return -advantages * ratio, {"ratio_sum": ratio.detach()}


def weighted_likelihood(log_probs, entropy, weights):
    return -weights * log_probs - 0.01 * entropy


class Probe(Method):
    """Rollouts on the policy's optimizer; then the demonstration, weighed by entropy, on another.

    The demonstration is graded as if it were a rollout.
    """

    name = "probe"

    @classmethod
    def optimizers(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        return {"second": {"lr": 5e-3, "weight_decay": 0.5}}

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        self.num_groups = 0

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        sampled = RolloutRequest(prompt_ids=problem.prompt_ids, max_new_tokens=MAX_LENGTH)
        whole = RolloutRequest(
            prompt_ids=problem.prompt_ids, prefix_ids=problem.demonstration_ids, max_new_tokens=0
        )
        return [sampled] * NUM_ROLLOUTS + [whole]

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        self.num_groups += len(groups)
        rows, demonstrations = [], []
        for group in groups:
            *sampled, whole = group.rollouts
            rows += [
                TrainRow.of_rollout(rollout, advantage=rollout.reward - 0.5, prefix_advantage=0.0)
                for rollout in sampled
            ]
            tokens = Segment(token_ids=whole.response_ids, source="demonstration", weight=2.0)
            demonstrations.append(
                TrainRow(prompt_ids=whole.prompt_ids, segments=(tokens,), origin=group.problem)
            )
        return [
            MiniBatch(rows=rows, normalizer=len(rows) * MAX_LENGTH),
            MiniBatch(rows=demonstrations, normalizer=10.0, optimizer="second"),
        ]

    def stats_rows(self, mini_batch: MiniBatch) -> list[int]:
        return list(range(len(mini_batch.rows))) if mini_batch.optimizer == "second" else []

    def prepare(self, batch, log_probs, entropy, step):
        return replace(batch, weights=batch.weights * (-entropy).exp())

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        if mini_batch.optimizer == "second":
            return TokenLoss(weighted_likelihood, inputs=("weights",))
        return TokenLoss(ratio_loss, inputs=("old_log_probs", "advantages"))

    def figures(self, groups, updates, has_answer) -> Iterator[Figure]:
        yield Figure(
            "probe/ratio_mean", updates[0].sums["ratio_sum"], updates[0].sums["num_tokens"]
        )

    def state(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.num_groups = state["num_groups"]


def token_figures(model, row: TrainRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a response, from whole softmaxes."""
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE]
    log_p = torch.log_softmax(logits, -1)[len(row.prompt_ids) - 1 : -1]
    log_probs = log_p[torch.arange(len(log_p)), torch.tensor(row.response_ids)]
    return log_probs, -(log_p.exp() * log_p).sum(-1)


def test_both_updates_equal_the_straight_line_script() -> None:
    trainer = make_trainer(CONFIG)
    model = copy.deepcopy(trainer.policy.model)
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    for group in groups:
        *sampled, whole = group.rollouts
        assert len(sampled) == NUM_ROLLOUTS and all(not rollout.is_hybrid for rollout in sampled)
        assert whole.response_ids == group.problem.demonstration_ids
        assert whole.rollout_log_probs == () and whole.finish_reason == "stop"
        assert whole.reward == trainer.rewarder.rule(whole.text, group.problem)
    on_policy, demonstrations = Probe(None, None).mini_batches(groups, 0)

    old = [token_figures(model, row)[0].detach() for row in on_policy.rows]
    loss = 0.0
    for row, old_log_probs in zip(on_policy.rows, old, strict=True):
        log_probs, _ = token_figures(model, row)
        loss = loss - (row.origin.reward - 0.5) * (log_probs - old_log_probs).exp().sum()
    (loss / on_policy.normalizer).backward()
    apply_update(trainer.config, model, {}, 1)
    loss = 0.0
    for row in demonstrations.rows:
        log_probs, entropy = token_figures(model, row)
        weights = 2.0 * (-entropy.detach()).exp()
        loss = loss - (weights * log_probs).sum() - 0.01 * entropy.sum()
    (loss / demonstrations.normalizer).backward()
    second = replace(trainer.config, optimizer=trainer.optimizer_configs["second"])
    apply_update(second, model, {}, 1)

    metrics, _ = trainer.train_step(Interrupt())
    assert largest_difference(trainer.policy.model, model) < 1e-9
    assert metrics["optim/lr"] == 1e-2 and metrics["optim/second_lr"] == 5e-3
    assert metrics["probe/ratio_mean"] == pytest.approx(1.0)
    # Whole demonstrations are no rollouts.
    assert metrics["rollout/left_out_frac"] == 0
    rewards = [rollout.reward for group in groups for rollout in group.rollouts[:-1]]
    assert metrics["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))


def test_a_checkpoint_keeps_all_optimizers_and_what_the_method_remembers(tmp_path: Path) -> None:
    whole, begun, resumed = (make_trainer(CONFIG) for _ in range(3))
    for trainer, num_steps in ((whole, 4), (begun, 2), (resumed, 1)):
        for _ in range(num_steps):
            trainer.train_step(Interrupt())
    with CheckpointWriter(tmp_path, keep=1, in_background=False) as checkpoints:
        begun.save(checkpoints)
    resumed.restore(list_checkpoints(tmp_path)[-1])
    assert resumed.method.num_groups == 2 * 4
    for _ in range(2):
        resumed.train_step(Interrupt())
    assert largest_difference(resumed.policy.model, whole.policy.model) == 0
    assert resumed.method.num_groups == whole.method.num_groups == 4 * 4


def test_a_class_of_ones_own_is_found_by_its_path_and_registered() -> None:
    found = find_method(CONFIG["method"]["name"])
    assert found.__qualname__ == "Probe" and found is METHODS["probe"]
    assert register(found) is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prefix_rl", "method.name: expected one of prefix_rft, rft, sft"),
        ("tests.methods.test_method:Missing", "cannot be imported"),
        ("no_such_module:Probe", "cannot be imported"),
        ("tests.methods.test_method:CONFIG", "expected a subclass of Method"),
    ],
)
def test_what_is_no_method_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"method": {"name": name}})


def test_a_name_that_is_taken_is_refused() -> None:
    other = type("Other", (Method,), {"name": "rft"})
    with pytest.raises(ValueError, match="'rft' is already that of RFT"):
        register(other)


def test_what_methods_inherit_is_shown_once() -> None:
    assert describe({"policy/demonstration_nll_mean": 0.5}) == [("demos", "nll 0.500")]
    charts = declared_charts()
    assert all(chart not in charts[:k] for k, chart in enumerate(charts))


class Likelihood(Method):
    """Every rollout is made more likely, whatever its reward."""

    name = "likelihood"

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        return [RolloutRequest(prompt_ids=problem.prompt_ids, max_new_tokens=MAX_LENGTH)] * 3

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        rows = [
            TrainRow.of_rollout(rollout, advantage=1.0, prefix_advantage=0.0)
            for group in groups
            for rollout in group.rollouts
        ]
        return [MiniBatch(rows=rows[k::2], normalizer=100.0) for k in range(2)]

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        return TokenLoss(lambda log_probs, entropy: -log_probs)


def test_the_gap_is_that_of_the_policy_that_generated() -> None:
    """The second update of a step sees another policy, and may: it takes no ratio."""
    METHODS["likelihood"] = Likelihood
    values = CONFIG | {"method": {"name": "likelihood"}}
    values["rollout"] = CONFIG["rollout"] | {"max_log_prob_gap": 1e-4}
    try:
        trainer = make_trainer(values)
        metrics, _ = trainer.train_step(Interrupt())
    finally:
        del METHODS["likelihood"]
    assert metrics["rollout/log_prob_gap_mean"] < 1e-4
