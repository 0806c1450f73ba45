"""Rows that engine and trainer see too differently are not learnt from."""

import copy
from collections.abc import Callable
from dataclasses import replace
from math import log, nan

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import Group, Problem, Rollout, TrainRow
from prefix_rft.methods import METHODS
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.mismatch import mismatched_rows, without_rows
from prefix_rft.train.packing import pack
from prefix_rft.train.trainer import Trainer
from tests.methods.test_method import Likelihood
from tests.tiny import make_trainer
from tests.train.test_update import (
    CONFIG,
    apply_update,
    largest_difference,
    straight_line_update,
)

EXACT = CONFIG["optimizer"] | {"eps": 1e-4}
PROBLEM = Problem(index=0, prompt="", prompt_ids=(5, 6), answer="")


def row(prefix_length: int, *engine: float) -> TrainRow:
    """A prompt of 2 tokens, a prefix, and as many sampled tokens as the engine has log-probs of."""
    rollout = Rollout(
        prompt_ids=PROBLEM.prompt_ids,
        response_ids=(7,) * (prefix_length + len(engine)),
        prefix_length=prefix_length,
        rollout_log_probs=engine,
        finish_reason="stop",
        text="",
        reward=1.0,
        status="correct",
    )
    return TrainRow.of_rollout(rollout, advantage=1.0, prefix_advantage=1.0)


def test_a_worked_example() -> None:
    """The trainer gives every token 1/2."""
    rows = [
        row(0, log(1 / 2), log(1 / 2)),  # as the engine does
        row(0, log(1 / 2), log(1 / 3)),  # (1/4) / (1/6) = 1.5
        row(0, log(1 / 2), log(1 / 5)),  # (1/4) / (1/10) = 2.5, of a token 1.58
        row(3, log(1 / 2), log(0.99), log(0.99)),  # (1/8) / 0.49 = 1/3.92, of a token 1/1.58
        row(2),  # nothing of it was sampled
        row(1, nan),
        row(0, log(1 / 5)),  # 2.5, and of a token too
    ]
    batch = pack(rows, device=torch.device("cpu"), dtype=torch.float64)
    log_probs = torch.where(batch.response_mask, log(1 / 2), 0.0).double()

    def out(limit: float, level: str) -> list[int]:
        found = mismatched_rows(batch, log_probs, limit=limit, level=level)
        return found.nonzero()[:, 0].tolist()

    assert out(2.0, "sequence") == [2, 3, 5, 6]
    assert out(1.4, "sequence") == [1, 2, 3, 5, 6]
    assert out(3.0, "sequence") == [3, 5]
    assert out(2.0, "geometric") == [5, 6]
    assert out(1.57, "geometric") == [2, 3, 5, 6]

    kept = without_rows(batch, mismatched_rows(batch, log_probs, limit=2.0, level="sequence"))
    bounds = batch.cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for name in ("response_mask", "prefix_mask"):
            before, after = getattr(batch, name)[start:end], getattr(kept, name)[start:end]
            assert torch.equal(after, before) if i in (0, 1, 4) else not after.any()


def tamper(trainer: Trainer, is_bad: Callable[[Rollout], bool], shift: float) -> list[Rollout]:
    """Shift the engine's log-probs of some rollouts, by `shift` in all; returns these."""
    rollouts, bad = trainer.rollouts, []

    def changed(each: Rollout) -> Rollout:
        if not is_bad(each):
            return each
        first, *others = each.rollout_log_probs
        bad.append(replace(each, rollout_log_probs=(first + shift, *others)))
        return bad[-1]

    def tampered(step_metrics: StepMetrics, interrupt: Interrupt) -> list[Group]:
        groups = rollouts(step_metrics, interrupt)
        bad.clear()
        return [replace(g, rollouts=tuple(map(changed, g.rollouts))) for g in groups]

    trainer.rollouts = tampered
    return bad


def is_bad(rollout: Rollout) -> bool:
    """Hybrid or not, in a group of its own kind or another: about every third."""
    return sum(rollout.response_ids) % 3 == 0


@pytest.mark.parametrize("prompts_per_update", [4, 2])
@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_the_update_is_that_of_the_other_rows(prompts_per_update: int, shift: float) -> None:
    values = CONFIG | {"optimizer": EXACT}
    values["rollout"] = CONFIG["rollout"] | {
        "max_sequence_mismatch": 2.0,
        "max_log_prob_gap": None,
    }
    values["trainer"] = CONFIG["trainer"] | {"prompts_per_update": prompts_per_update}
    trainer = make_trainer(values)
    bad = tamper(trainer, is_bad, shift)
    before, model = (copy.deepcopy(trainer.policy.model) for _ in range(2))
    groups, moments = trainer.rollouts(StepMetrics(), Interrupt()), {}
    taught = [g for g in groups if len({r.reward for r in g.rollouts}) > 1]
    learnt = [rollout for group in taught for rollout in group.rollouts]
    left_out = [rollout for rollout in bad if rollout in learnt]
    assert 1 < len(left_out) < len(learnt) - 1
    assert len({rollout.is_hybrid for rollout in left_out}) == 2

    for step, start in enumerate(range(0, 4, prompts_per_update), start=1):
        part = groups[start : start + prompts_per_update]
        with torch.no_grad():
            old = old_of(trainer, before, part, left_out)
        loss, *_ = straight_line_update(
            trainer.config, model, part, left_out=left_out, old_log_probs=old
        )
        loss.backward()
        apply_update(trainer.config, model, moments, step)
    metrics, sample = trainer.train_step(Interrupt())
    assert largest_difference(trainer.policy.model, model) < 1e-9
    assert metrics["rollout/mismatched_frac"] == pytest.approx(len(left_out) / len(learnt))
    assert sample["rollouts"][-1]["prefix_length"] > 0  # the report shows rows as they were


def old_of(trainer: Trainer, model, groups: list[Group], left_out: list[Rollout]) -> list:
    """Log-probs of the responses before the step, in the order of the script's rows."""
    temperature, found = trainer.config.rollout.temperature, []
    for group in groups:
        if len({rollout.reward for rollout in group.rollouts}) == 1:
            continue
        for each in group.rollouts:
            if each in left_out:
                continue
            ids = torch.tensor([each.prompt_ids + each.response_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logits = logits[:, : trainer.policy.lm_head.vocab_size] / temperature
            log_p = torch.log_softmax(logits, -1)[len(each.prompt_ids) - 1 : -1]
            found.append(log_p.gather(1, torch.tensor(each.response_ids)[:, None])[:, 0])
    return found


def test_the_loss_of_a_function_does_not_see_them_either() -> None:
    METHODS["likelihood"] = Likelihood
    values = CONFIG | {"method": {"name": "likelihood"}, "optimizer": EXACT}
    rollout = CONFIG["rollout"] | {"max_log_prob_gap": None}
    try:
        masked = make_trainer(values | {"rollout": rollout | {"max_sequence_mismatch": 2.0}})
        fewer, all_rows = (make_trainer(values | {"rollout": rollout}) for _ in range(2))
        bad = tamper(masked, is_bad, 1.0)
        mini_batches = fewer.method.mini_batches
        fewer.method.mini_batches = lambda groups, step: [
            replace(each, rows=[row for row in each.rows if not is_bad(row.origin)])
            for each in mini_batches(groups, step)
        ]
        metrics, _ = masked.train_step(Interrupt())
        for trainer in (fewer, all_rows):
            trainer.train_step(Interrupt())
    finally:
        del METHODS["likelihood"]
    assert 0 < metrics["rollout/mismatched_frac"] == len(bad) / 12
    assert largest_difference(masked.policy.model, fewer.policy.model) < 1e-9
    assert largest_difference(masked.policy.model, all_rows.policy.model) > 1e-4


def test_where_no_row_is_left_there_is_no_update() -> None:
    rollout = CONFIG["rollout"] | {"max_sequence_mismatch": 2.0, "max_log_prob_gap": None}
    trainer = make_trainer(CONFIG | {"rollout": rollout})
    tamper(trainer, lambda rollout: True, 1.0)
    before = copy.deepcopy(trainer.policy.model)
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["rollout/mismatched_frac"] == 1
    assert metrics["optim/updates_sum"] == 0
    assert largest_difference(trainer.policy.model, before) == 0


def test_it_is_off_unless_it_is_asked_for_and_then_changes_nothing_else() -> None:
    records, models = [], []
    for limit in ({}, {"max_sequence_mismatch": 2.0}):
        trainer = make_trainer(CONFIG | {"rollout": CONFIG["rollout"] | limit})
        records.append(trainer.train_step(Interrupt())[0])
        models.append(trainer.policy.model)
    assert "rollout/mismatched_frac" not in records[0]
    assert records[1]["rollout/mismatched_frac"] == 0
    assert largest_difference(*models) == 0


@pytest.mark.parametrize("value", [1.0, 0.5, nan])
def test_a_limit_that_no_row_could_keep_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="rollout.max_sequence_mismatch"):
        config_from_dict({"rollout": {"max_sequence_mismatch": value}})
