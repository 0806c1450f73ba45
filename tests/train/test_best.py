"""Benchmarks during training, and the model of the best evaluation."""

import json
from pathlib import Path

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.train.run import train
from tests.tiny import make_run

SUITES = {"suites": "aime24, math500", "suite_samples": 2, "every": 1}


def run_with(folder: Path, **eval_fields):
    rows = [
        {"data_source": source, "problem": f"{source} {i}", "answer": str(i)}
        for source in ("aime", "math")
        for i in range(3)
    ]
    file = folder / "benchmarks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"num_samples": 2} | SUITES | {"suite_data": str(file)} | eval_fields
    return make_run(folder, eval=fields, trainer={"num_steps": 3})


def evaluations(run_dir: Path) -> dict[int, dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {each["step"]: each for each in map(json.loads, lines) if each["kind"] == "eval"}


def test_suites_are_evaluated_and_the_first_best_model_is_kept(tmp_path: Path) -> None:
    config = run_with(tmp_path, select_by="held_out")
    summary = train(config)
    records = evaluations(config.run_dir)
    assert set(records) == {0, 1, 2, 3}
    for record in records.values():
        assert record["eval/num_problems/aime24"] == 3
        assert 0 <= record["eval/avg@2/math500"] <= 1
    trained = {step: record["eval/avg@2"] for step, record in records.items() if step}
    best = max(trained.values())
    first = min(step for step, value in trained.items() if value == best)
    assert summary["best"] == {"step": first, "metric": "avg@2", "value": best}
    names = {path.name for path in (config.run_dir / "best").iterdir()}
    assert {"model.safetensors", "config.json"} <= names
    same = [
        (config.run_dir / folder / "model.safetensors").read_bytes() for folder in ("best", "model")
    ]
    assert (same[0] == same[1]) == (first == 3)


def test_no_model_is_selected_on_a_benchmark_unless_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval.select_by: expected held-out problems that are no"):
        train(run_with(tmp_path, select_by="math500"))
    assert not (tmp_path / "run").exists() or not (tmp_path / "run/summary.json").exists()
    summary = train(run_with(tmp_path, select_by="math500", select_on_test=True))
    assert summary["best"]["metric"] == "avg@2/math500"


def test_held_out_problems_of_a_benchmark_do_not_select_either(tmp_path: Path) -> None:
    config = run_with(tmp_path, select_by="held_out")
    file = tmp_path / "benchmarks.jsonl"
    values = {"data": {"path": config.data.path, "eval_path": str(file), "num_eval": 2}}
    held_out = make_run(tmp_path, eval={"select_by": "held_out"}, **values)
    with pytest.raises(ConfigError, match="eval.select_by: expected held-out problems"):
        train(held_out)


def test_what_selects_must_be_evaluated() -> None:
    with pytest.raises(ConfigError, match="eval.select_by: expected held_out or one of eval.suite"):
        config_from_dict({"eval": {"select_by": "math500"}})


def test_an_unknown_suite_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval.suites: expected some of math, aime24"):
        train(run_with(tmp_path, suites="aime26"))


def test_a_checkpoint_and_a_model_of_a_run_can_be_evaluated_with_its_settings(
    tmp_path: Path, capsys
) -> None:
    from prefix_rft.cli import main

    config = run_with(tmp_path, select_by="held_out", suites=None)
    train(config)
    last = config.run_dir / "checkpoints/step-000003"
    capsys.readouterr()
    accuracies = []
    for model in (config.run_dir, last, config.run_dir / "model"):
        assert main(["eval", str(model), "--eval.suites", "None", "--eval.select-by", "None"]) == 0
        out = capsys.readouterr().out
        accuracies.append(json.loads(out[out.index("{") :])["avg@2"])
    assert accuracies[0] == accuracies[1] == accuracies[2]
    assert (config.run_dir / "exports/step-000003/model.safetensors").is_file()
