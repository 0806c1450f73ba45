"""The method that docs/methods.md shows, run as it stands there."""

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefix_rft.methods import METHODS
from prefix_rft.metrics import StepMetrics
from prefix_rft.train import train
from prefix_rft.train.interrupt import Interrupt
from tests.tiny import make_run, make_tokenizer, make_trainer

DOCUMENT = Path(__file__).parents[2] / "docs/methods.md"
METHOD = {"name": "docs_method:Raft"}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "docs_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    METHODS.pop("raft", None)
    sys.modules.pop("docs_method", None)


def test_it_trains(tmp_path: Path) -> None:
    config = make_run(tmp_path, method=METHOD, raft={"min_reward": 0.5}, trainer={"num_steps": 2})
    summary = train(config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert {"base", "trained"} <= summary.keys()
    assert len(steps) == 2
    assert all(0 < step["raft/kept_frac"] == step["reward/mean"] < 1 for step in steps)
    assert all(step["optim/grad_norm_mean"] > 0 for step in steps)
    assert "Kept rollouts" in (config.run_dir / "report.html").read_text()


def test_its_loss_is_the_mean_over_the_tokens_of_correct_rollouts() -> None:
    trainer = make_trainer(
        {
            "method": METHOD,
            "model": {"dtype": "float64"},
            "rollout": {"group_size": 4, "max_response_length": 24},
            "trainer": {"prompts_per_step": 4, "prompts_per_update": 4, "micro_batch_tokens": 64},
        }
    )
    model = copy.deepcopy(trainer.policy.model)
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    correct = [rollout for rollout in rollouts if rollout.reward == 1]
    assert 0 < len(correct) < len(rollouts)

    log_probs = []
    for rollout in correct:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :, : len(make_tokenizer())]
        log_p = logits.log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        log_probs.append(log_p.gather(1, torch.tensor(rollout.response_ids)[:, None]))
    metrics, _ = trainer.train_step(Interrupt())
    assert metrics["policy/loss_mean"] == pytest.approx(
        -torch.cat(log_probs).mean().item(), abs=1e-9
    )
