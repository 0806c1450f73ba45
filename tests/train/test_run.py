"""A whole run from the command line: files it leaves, interruption, resumption."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_rft.checks import ConfigError, UserError
from prefix_rft.config import Config, load_config, packages, save_config
from prefix_rft.train.checkpoint import CheckpointError
from prefix_rft.train.resume import open_run
from prefix_rft.train.run import evaluate_model, export_checkpoint, train
from tests.tiny import make_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_run(tmp_path)


def step_records(run_dir: Path) -> list[dict]:
    """Training records without what depends on the clock."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    timed = ("time/", "throughput/")
    return [
        {name: value for name, value in record.items() if not name.startswith(timed)}
        for record in records
    ]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()


def test_a_run_leaves_everything_it_promises(config) -> None:
    summary = train(config)
    run_dir = config.run_dir
    for name in ("config.toml", "metrics.jsonl", "rollouts.jsonl", "summary.json", "report.html"):
        assert (run_dir / name).stat().st_size > 0, name
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    for results in (summary["base"], summary["trained"]):
        assert 0 <= results["greedy"] <= 1 and 0 <= results["avg@2"] <= 1
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004"]
    base = AutoModelForCausalLM.from_pretrained(config.model.path).state_dict()
    trained = weights(run_dir)
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    records = [record for record in step_records(run_dir) if record["kind"] == "train"]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[0]["prefix/low"] == pytest.approx(0.95)
    # Engine and trainer agree on the log-probs of what was sampled.
    assert all(record["rollout/log_prob_gap_mean"] < 1e-5 for record in records)


def test_chosen_steps_leave_a_profile(config) -> None:
    train(replace(config, trainer=replace(config.trainer, num_steps=2, profile_steps=(1,))))
    [trace] = (config.run_dir / "profiles").iterdir()
    assert trace.name == "step-000001.json.gz"
    with gzip.open(trace) as stream:
        names = {event["name"] for event in json.load(stream)["traceEvents"]}
    assert any("mm" in name for name in names)


def test_a_finished_run_is_left_as_it_is(config) -> None:
    summary = train(config)
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    assert train(config, resume=True) == summary
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_can_be_exported_and_evaluated(config, tmp_path: Path) -> None:
    summary = train(config)
    export_checkpoint(config.run_dir, 2, tmp_path / "step-2")
    export_checkpoint(config.run_dir, None, tmp_path / "newest")
    newest, final = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "newest", config.run_dir / "model")
    )
    assert all(torch.equal(newest[name], final[name]) for name in final)
    earlier = AutoModelForCausalLM.from_pretrained(tmp_path / "step-2").state_dict()
    assert any(not torch.equal(earlier[name], final[name]) for name in final)
    results = evaluate_model(config, str(tmp_path / "newest"))
    assert results == summary["trained"] | {"data": summary["data"]}
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of step 3, got \[2, 4\]"):
        export_checkpoint(config.run_dir, 3, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_resume_ends_as_if_there_had_been_none(
    config, tmp_path: Path, number: int, status: int
) -> None:
    config = replace(config, trainer=replace(config.trainer, num_steps=40, checkpoint_every=0))
    save_config(config, tmp_path / "run.toml")
    command = [sys.executable, "-m", "prefix_rft.cli", "train", str(tmp_path / "run.toml")]
    # One thread as in this process: sums then have one order.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=os.environ | environment)
    metrics = config.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    [checkpoint] = (config.run_dir / "checkpoints").iterdir()
    assert 1 <= int(checkpoint.name.removeprefix("step-")) < 40

    train(config, resume=True)
    whole = replace(config, output_dir=str(tmp_path / "uninterrupted"))
    train(whole)
    assert step_records(config.run_dir) == step_records(whole.run_dir)
    ours, theirs = weights(config.run_dir), weights(whole.run_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_that_are_dropped_are_told_by_training_and_evaluation(config, capsys) -> None:
    path = Path(config.data.path)
    rows = [{"prompt": "no answer", "answer": ""}, {"prompt": "long" * 99, "answer": "1"}]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, trainer=replace(config.trainer, num_steps=1))
    summary = train(config)
    [counts] = summary["data"]
    assert (counts["num_rows"], counts["num_problems"]) == (14, 12)
    assert counts["findings"] == {"no_answer": 1, "long_prompt": 1}
    trained = capsys.readouterr().out
    results = evaluate_model(config, config.model.path)
    assert results["data"] == summary["data"]
    for text in (trained, capsys.readouterr().err):
        assert "12 problems " in text and "no usable answer" in text


def test_an_empty_dataset_is_one_clear_error(config) -> None:
    Path(config.data.path).write_text("")
    with pytest.raises(UserError, match="data.jsonl"):
        train(config)


def test_a_refused_run_leaves_the_folder_as_it_was(config, tmp_path: Path, capsys) -> None:
    train(config)
    before = (config.run_dir / "config.toml").read_text()
    more = replace(config, trainer=replace(config.trainer, num_steps=6))
    nowhere = replace(more, model=replace(config.model, path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"model\.path: "):
        train(nowhere, resume=True)
    fewer = replace(config, trainer=replace(config.trainer, num_steps=3))
    with pytest.raises(ConfigError, match=r"num_steps: expected at least the 4 steps .* got 3"):
        train(fewer, resume=True)
    assert (config.run_dir / "config.toml").read_text() == before
    train(config, resume=True)
    assert "is finished" in capsys.readouterr().out
    train(more, resume=True)
    assert load_config(config.run_dir / "config.toml") == more


def test_a_run_is_continued_with_its_own_seed_and_method(config) -> None:
    config = replace(config, trainer=replace(config.trainer, num_steps=2))
    train(config)
    before = (config.run_dir / "config.toml").read_bytes()
    more = replace(config, trainer=replace(config.trainer, num_steps=4))
    with pytest.raises(ConfigError, match=r"^seed: expected 0, with which .*/run .*, got 7$"):
        train(replace(more, seed=7), resume=True)
    with pytest.raises(ConfigError, match=r"^method\.name: expected 'prefix_rft', .* got 'rft'$"):
        train(replace(more, method=replace(more.method, name="rft")), resume=True)
    assert (config.run_dir / "config.toml").read_bytes() == before


def test_what_has_changed_is_told_and_the_base_measured_again(config, capsys) -> None:
    config = replace(config, trainer=replace(config.trainer, num_steps=2))
    train(config)
    changed = replace(
        config,
        trainer=replace(config.trainer, num_steps=3),
        rollout=replace(config.rollout, temperature=0.5),
    )
    capsys.readouterr()
    assert train(changed, resume=True)["base"].keys() >= {"avg@2"}
    output = capsys.readouterr().out
    assert (
        "changed since the run began: rollout.temperature 1.0 -> 0.5, trainer.num_steps 2 -> 3\n"
    ) in output
    assert "evaluating the base model" not in output
    other = replace(
        changed,
        trainer=replace(config.trainer, num_steps=4),
        eval=replace(config.eval, num_samples=3),
    )
    summary = train(other, resume=True)
    assert "avg@3" in summary["base"] and "avg@3" in summary["trained"]


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({}, True),
        ({"trainer": {"checkpoint_every": 3}}, True),
        ({"seed": 1}, False),
        ({"eval": {"num_samples": 3}}, False),
    ],
)
def test_results_of_the_base_are_kept_while_they_hold(config, changes, is_kept) -> None:
    """Of a run that was stopped before its first checkpoint."""
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.toml")
    (config.run_dir / "summary.json").write_text('{"base": {}}')
    for name, value in changes.items():
        new = replace(getattr(config, name), **value) if isinstance(value, dict) else value
        config = replace(config, **{name: new})
    assert open_run(config, resume=True) == ({"base": {}} if is_kept else {}, [])
    assert open_run(config, resume=False) == ({}, [])


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("rollout", "engine", "vllm", r"rollout\.engine: vllm is not installed; .*\[vllm\]"),
        ("model", "lora_rank", 4, r"model\.lora_rank: peft is not installed; .*\[lora\]"),
        ("optimizer", "name", "adamw_8bit", r"optimizer\.name: torchao .*\[low-memory\]"),
        ("log", "wandb_project", "x", r"log\.wandb_project: wandb is not installed; .*\[wandb\]"),
        ("rollout", "max_response_length", 40_000, "expected, .* at most the 32768 .* got 40032"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(
    config, monkeypatch, section, field, value, message
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    section_of = replace(getattr(config, section), **{field: value})
    with pytest.raises(ConfigError, match=message):
        train(replace(config, **{section: section_of}))
    assert list(config.run_dir.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_clear_error(config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: expected a folder .* got .*/file"):
        train(replace(config, output_dir=str(tmp_path / "file")))
