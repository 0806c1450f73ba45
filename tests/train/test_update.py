"""One update of the trainer against a straight-line script that materialises everything."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from prefix_rft.config import Config
from prefix_rft.config.sections import OptimizerConfig
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.train import trainer as trainer_module
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.optimizer import learning_rate
from tests.tiny import make_tokenizer, make_trainer

VOCAB_SIZE = len(make_tokenizer())  # the model has more columns

CONFIG = {
    "model": {"dtype": "float64"},
    "rollout": {"group_size": 4, "max_response_length": 24, "temperature": 0.8},
    "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.01},
    "trainer": {
        "num_steps": 10,
        "prompts_per_step": 4,
        "prompts_per_update": 4,
        "micro_batch_tokens": 64,
    },
}


def straight_line_update(
    config: Config,
    model,
    groups,
    *,
    old_log_probs=None,
    entropy_coef=0.0,
    reference=None,
    left_out=(),
):
    """Loss, number of kept prefix tokens, number of prefix tokens: full softmaxes, row by row.

    With the model `reference` in place of the last two the mean KL to it.
    """
    temperature = config.rollout.temperature
    rows = []
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts]
        for rollout in group.rollouts:
            if rollout in left_out:
                continue
            if len(set(rewards)) > 1:
                rows.append((rollout, rollout.reward - sum(rewards) / len(rewards)))
            elif entropy_coef or reference is not None:
                rows.append((rollout, 0.0))

    def statistics(model, rollout):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE] / temperature
        log_p = torch.log_softmax(logits, dim=-1)[len(rollout.prompt_ids) - 1 : -1]
        log_probs = log_p.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        return log_probs, -(log_p.exp() * log_p).sum(-1)

    log_probs, entropies = zip(*(statistics(model, rollout) for rollout, _ in rows), strict=True)
    if reference is not None:
        ref_log_probs = [statistics(reference, rollout)[0].detach() for rollout, _ in rows]

    pool = [
        (-entropies[b][t].item(), b, t)
        for b, (rollout, advantage) in enumerate(rows)
        for t in range(rollout.prefix_length if advantage else 0)
    ]
    kept = {(b, t) for _, b, t in sorted(pool)[: len(pool) - len(pool) * 4 // 5]}

    kl_of = {
        "k1": lambda d: d,
        "k2": lambda d: d**2 / 2,
        "k3": lambda d: (-d).exp() - 1 + d,
    }
    kls = []
    total = torch.zeros((), dtype=torch.float64)
    for b, (rollout, advantage) in enumerate(rows):
        old = log_probs[b].detach() if old_log_probs is None else old_log_probs[b]
        for t in range(len(rollout.response_ids)):
            if t >= rollout.prefix_length or (b, t) in kept:
                ratio = (log_probs[b][t] - old[t]).exp()
                clipped = ratio.clamp(1 - config.loss.clip_low, 1 + config.loss.clip_high)
                total = total + torch.maximum(-advantage * ratio, -advantage * clipped)
                total = total - entropy_coef * entropies[b][t]
                if reference is not None:
                    kls.append(kl_of[config.loss.kl](log_probs[b][t] - ref_log_probs[b][t]))
    num_rollouts = sum(len(group.rollouts) for group in groups)
    normalizer = num_rollouts * config.rollout.max_response_length
    if reference is not None:
        kl = torch.stack(kls)
        return (total + config.loss.kl_coef * kl.sum()) / normalizer, kl.mean().item()
    return total / normalizer, len(kept), len(pool)


def apply_update(config: Config, model, moments: dict, step: int) -> None:
    """Clip by the global norm, then AdamW (arXiv 1711.05101, Algorithm 2), written out."""
    parameters = dict(model.named_parameters())
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters.values()))
    scale = min(1.0, config.optimizer.max_grad_norm / (norm + 1e-6))
    beta1, beta2 = config.optimizer.betas
    lr, decay = config.optimizer.lr, config.optimizer.weight_decay
    with torch.no_grad():
        for name, parameter in parameters.items():
            grad = parameter.grad * scale
            m, v = moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
            m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
            moments[name] = (m, v)
            m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
            parameter.mul_(1 - lr * decay)
            parameter.sub_(lr * m_hat / (v_hat.sqrt() + config.optimizer.eps))
            parameter.grad = None


def largest_difference(model, other) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_update_equals_the_straight_line_script() -> None:
    trainer = make_trainer(CONFIG)
    model = copy.deepcopy(trainer.policy.model)
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    assert any(len({r.reward for r in group.rollouts}) == 1 for group in groups)  # one is left out

    loss, num_kept, num_prefix = straight_line_update(trainer.config, model, groups)
    loss.backward()
    apply_update(trainer.config, model, {}, 1)
    metrics, _ = trainer.train_step(Interrupt())

    assert num_kept > 1
    assert metrics["policy/kept_frac"] == pytest.approx(num_kept / num_prefix)
    assert metrics["policy/loss_mean"] == pytest.approx(loss.item(), abs=1e-9)
    assert largest_difference(trainer.policy.model, model) < 1e-6
    moved = largest_difference(model, make_trainer(CONFIG).policy.model)
    assert moved > 1e-3  # the comparison is not of two models that stood still


def test_with_an_entropy_bonus_rollouts_without_an_advantage_have_a_gradient_too() -> None:
    """Their continuations alone: no prefix of theirs is in the pool, so none is selected."""
    coefficient = 0.05
    trainer = make_trainer(CONFIG | {"loss": {"entropy_coef": coefficient}})
    model = copy.deepcopy(trainer.policy.model)
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    dead = [group for group in groups if len({r.reward for r in group.rollouts}) == 1]
    assert 0 < len(dead) < len(groups)

    loss, num_kept, num_prefix = straight_line_update(
        trainer.config, model, groups, entropy_coef=coefficient
    )
    loss.backward()
    apply_update(trainer.config, model, {}, 1)
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["policy/kept_frac"] == pytest.approx(num_kept / num_prefix)
    assert metrics["rollout/left_out_frac"] == 0
    assert metrics["policy/loss_mean"] == pytest.approx(loss.item(), abs=1e-9)
    assert largest_difference(trainer.policy.model, model) < 1e-9


def test_several_updates_keep_the_ratio_to_the_policy_that_generated() -> None:
    trainer = make_trainer(CONFIG | {"trainer": CONFIG["trainer"] | {"prompts_per_update": 2}})
    config, model = trainer.config, copy.deepcopy(trainer.policy.model)
    groups = trainer.rollouts(StepMetrics(), Interrupt())

    def response_log_probs(rollout):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE]
        logits = logits / config.rollout.temperature
        log_p = torch.log_softmax(logits, dim=-1)[len(rollout.prompt_ids) - 1 : -1]
        return log_p.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]

    parts = [groups[:2], groups[2:]]
    old = [
        [
            response_log_probs(rollout)
            for group in part
            for rollout in group.rollouts
            if len({r.reward for r in group.rollouts}) > 1
        ]
        for part in parts
    ]
    moments = {}
    for step, (part, old_log_probs) in enumerate(zip(parts, old, strict=True), start=1):
        loss, *_ = straight_line_update(config, model, part, old_log_probs=old_log_probs)
        loss.backward()
        apply_update(config, model, moments, step)

    metrics, _ = trainer.train_step(Interrupt())
    assert largest_difference(trainer.policy.model, model) < 1e-6
    assert metrics["policy/approx_kl_mean"] != 0  # the second update did see another policy


@pytest.mark.parametrize("change", ["one row each", "one batch", "reversed order"])
def test_update_does_not_depend_on_micro_batches(change: str, monkeypatch) -> None:
    usual = make_trainer(CONFIG)
    usual.train_step(Interrupt())
    plan = trainer_module.plan_micro_batches
    if change == "reversed order":
        monkeypatch.setattr(
            trainer_module,
            "plan_micro_batches",
            lambda *args: [[rows[::-1] for rows in rounds[::-1]] for rounds in plan(*args)],
        )
        budget = 64
    else:
        budget = 1 if change == "one row each" else 100_000
    other = make_trainer(CONFIG | {"trainer": CONFIG["trainer"] | {"micro_batch_tokens": budget}})
    other.train_step(Interrupt())
    assert largest_difference(usual.policy.model, other.policy.model) < 1e-6


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_without_advantage_change_nothing(reward: float) -> None:
    trainer = make_trainer(CONFIG)
    trainer.rewarder.rule = lambda text, problem: reward
    before = copy.deepcopy(trainer.policy.model)
    metrics, sample = trainer.train_step(Interrupt())
    assert largest_difference(trainer.policy.model, before) == 0
    assert metrics["rollout/left_out_frac"] == 1
    assert len(sample["rollouts"]) == 4
    assert trainer.step_index == 1


def test_a_gradient_that_is_not_finite_is_skipped_and_counted() -> None:
    trainer = make_trainer(CONFIG)
    parameter = next(trainer.policy.model.parameters())
    handle = parameter.register_hook(lambda grad: grad * math.inf)
    before = copy.deepcopy(trainer.policy.model)
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["optim/skipped_updates_sum"] == 1
    assert largest_difference(trainer.policy.model, before) == 0
    handle.remove()
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["optim/skipped_updates_sum"] == 0
    assert largest_difference(trainer.policy.model, before) > 0


def test_a_skipped_push_of_weights_is_caught(monkeypatch) -> None:
    trainer = make_trainer(CONFIG)
    monkeypatch.setattr(trainer.engine, "update_weights", lambda model, version: None)
    trainer.train_step(Interrupt())
    with pytest.raises(RuntimeError, match="stale weights"):
        trainer.train_step(Interrupt())


def test_hybrid_rollouts_replace_on_policy_ones() -> None:
    trainer = make_trainer(CONFIG)
    for group in trainer.rollouts(StepMetrics(), Interrupt()):
        assert [rollout.is_hybrid for rollout in group.rollouts] == [False, False, False, True]
        hybrid = group.rollouts[-1]
        demonstration = group.problem.demonstration_ids
        assert (
            hybrid.response_ids[: hybrid.prefix_length] == (demonstration[: hybrid.prefix_length])
        )
        # At step 0 the window is [0.95, 0.95].
        assert hybrid.prefix_length == math.floor(0.95 * len(demonstration))
        assert len(hybrid.response_ids) <= trainer.config.rollout.max_response_length


def test_problems_without_a_demonstration_get_on_policy_rollouts() -> None:
    trainer = make_trainer(CONFIG)
    trainer.problems = [replace(problem, demonstration_ids=()) for problem in trainer.problems]
    metrics, _ = trainer.train_step(Interrupt())
    assert "reward/hybrid_mean" not in metrics
    assert "policy/kept_frac" not in metrics


def test_a_description_for_the_report_marks_prefix_and_selection() -> None:
    trainer = make_trainer(CONFIG)
    _, sample = trainer.train_step(Interrupt())
    hybrid = sample["rollouts"][-1]
    length, prefix_length = len(hybrid["tokens"]), hybrid["prefix_length"]
    assert prefix_length > 0
    assert len(hybrid["selected"]) == len(hybrid["entropy"]) == length
    assert not any(hybrid["selected"][prefix_length:])
    assert all(entropy > 0 for entropy in hybrid["entropy"])


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_learning_rate(schedule: str, shares: list[float]) -> None:
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=2)
    rates = [learning_rate(step, config, 6) for step in range(6)]
    assert rates == pytest.approx([2 * share for share in shares], abs=1e-4)
