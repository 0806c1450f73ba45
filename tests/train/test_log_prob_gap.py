"""The gap between engine and trainer: its figures, and the stop above the limit."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from prefix_rft.metrics.measures import LogProbGapError, gap_metrics
from prefix_rft.rollout.transformers_engine import TransformersEngine
from prefix_rft.train.checkpoint import list_checkpoints
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.run import train
from tests.tiny import make_run, make_trainer

CONFIG = {
    "rollout": {"group_size": 4, "max_response_length": 16, "max_log_prob_gap": 0.1},
    "trainer": {"num_steps": 4, "prompts_per_step": 4, "prompts_per_update": 2},
}


def shift_log_probs(monkeypatch, shift: float) -> None:
    """From now on engines report log-probs that are off by `shift`, and now and then no number."""
    generate = TransformersEngine.generate

    def shifted(self, requests, **options):
        completions = generate(self, requests, **options)
        return [
            replace(c, log_probs=(math.nan, *(p - shift for p in c.log_probs[1:])))
            for c in completions
        ]

    monkeypatch.setattr(TransformersEngine, "generate", shifted)


def test_figures_of_a_gap() -> None:
    gap = torch.cat([torch.full((98,), 0.1), torch.tensor([-0.5, 2.0])]).double()
    figures = gap_metrics(gap)
    assert figures["mean"] == pytest.approx((98 * 0.1 + 0.5 + 2.0) / 100)
    assert figures["p99"] == pytest.approx(0.5)
    assert figures["max"] == pytest.approx(2.0)
    # e^d - 1 - d by hand
    expected = (98 * 0.005170918 + 0.106530660 + 4.389056099) / 100
    assert figures["kl"] == pytest.approx(expected, rel=1e-6)
    assert gap_metrics(gap[:0]) == {}


@pytest.mark.parametrize("prompts_per_update", [2, 4])
def test_a_gap_above_the_limit_stops_before_anything_is_updated(
    monkeypatch, prompts_per_update
) -> None:
    sections = CONFIG["trainer"] | {"prompts_per_update": prompts_per_update}
    trainer = make_trainer(CONFIG | {"trainer": sections})
    before = copy.deepcopy(trainer.policy.model)
    shift_log_probs(monkeypatch, 0.2)
    with pytest.raises(LogProbGapError, match=r"expected at most 0\.1 nats .* mean 0\.2, p99 0\.2"):
        trainer.train_step(Interrupt())
    pairs = zip(trainer.policy.model.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert trainer.step_index == 0


@pytest.mark.parametrize("limit", [0.3, None])
def test_a_gap_below_the_limit_is_told(monkeypatch, limit) -> None:
    rollout = CONFIG["rollout"] | ({} if limit is None else {"max_log_prob_gap": limit})
    trainer = make_trainer(CONFIG | {"rollout": rollout})
    if limit is None:
        rollout = replace(trainer.config.rollout, max_log_prob_gap=None)
        trainer.config = replace(trainer.config, rollout=rollout)
    shift_log_probs(monkeypatch, 0.2)
    metrics, _ = trainer.train_step(Interrupt())
    for name in ("mean", "p99", "max"):
        assert metrics[f"rollout/log_prob_gap_{name}"] == pytest.approx(0.2, abs=1e-5)
    assert metrics["rollout/log_prob_gap_kl"] == pytest.approx(math.expm1(0.2) - 0.2, abs=1e-5)


def test_a_run_that_is_stopped_by_the_gap_keeps_its_last_whole_step(tmp_path, monkeypatch) -> None:
    config = make_run(tmp_path, trainer={"num_steps": 50, "checkpoint_every": 0})
    generate = TransformersEngine.generate
    calls = []

    def drifting(self, requests, **options):
        calls.append(options["weights_version"])
        if options["weights_version"] == 3:
            shift_log_probs(monkeypatch, 1.0)
        return generate(self, requests, **options)

    monkeypatch.setattr(TransformersEngine, "generate", drifting)
    with pytest.raises(LogProbGapError):
        train(config)
    last = max(calls)
    assert [path.name for path in list_checkpoints(config.run_dir)] == [f"step-{last:06d}"]
