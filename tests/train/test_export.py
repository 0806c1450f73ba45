"""What a run leaves is never lost: results are written before the model, and the model whatever
the generation config of its base says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config
from prefix_rft.model.loading import export, load_model, load_tokenizer, try_export
from prefix_rft.train import run as run_module
from prefix_rft.train.run import export_checkpoint, train
from tests.tiny import make_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_run(tmp_path, trainer={"num_steps": 2}, log={"tensorboard": False})
    return config


def set_generation_config(config: Config, values: dict) -> None:
    path = Path(config.model.path) / "generation_config.json"
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 0.0},
        {"top_k": 1},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"early_stopping": True},
        {"length_penalty": 2.0},
        {"pad_token_id": -1},
        {"output_scores": True},
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_carried_over(config, tmp_path, values) -> None:
    set_generation_config(config, values)
    model = load_model(config.model, config.model.path)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "refused")
    tokenizer = load_tokenizer(config.model.path)
    notice = try_export(model, tokenizer)
    assert "\n" not in notice and f"({', '.join(values)})" in notice
    export(model, tokenizer, tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(kept, name) for name in values} == values
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_one_that_can_be_saved_is_written_as_transformers_does(config, tmp_path) -> None:
    set_generation_config(config, {"do_sample": True, "top_p": 0.9, "eos_token_id": [1, 2]})
    model, tokenizer = (
        load_model(config.model, config.model.path),
        load_tokenizer(config.model.path),
    )
    assert try_export(model, tokenizer) is None
    export(model, tokenizer, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("generation_config.json", "config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()


def test_what_cannot_be_written_is_told_before_any_work(config, monkeypatch) -> None:
    def refuse(self, folder: Path) -> None:
        raise ValueError("no vocabulary to save")

    monkeypatch.setattr(type(load_tokenizer(config.model.path)), "save_pretrained", refuse)
    with pytest.raises(ConfigError, match="written again, .* no vocabulary to save"):
        train(config)
    assert not (config.run_dir / "summary.json").exists()


def fail(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_run_whose_model_cannot_be_written_keeps_its_results(
    config, tmp_path, monkeypatch, capsys
) -> None:
    set_generation_config(config, {"temperature": 0.9, "top_p": 0.6})
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "export", fail)
        with pytest.raises(OSError, match="No space"):
            train(config)
    assert "generation_config.json of the base is inconsistent (temp" in capsys.readouterr().out
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert "trained" in summary and not (config.run_dir / "model").exists()
    assert "finished" in (config.run_dir / "report.html").read_text()

    with monkeypatch.context() as patched:
        patched.setattr(run_module.Setup, "evaluate", fail)  # it has been done
        assert train(config, resume=True) == summary | {"model_step": 2}
    assert summary.keys() == {"data", "base", "trained"}
    export_checkpoint(config.run_dir, None, tmp_path / "out")
    for folder in (config.run_dir / "model", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
        assert GenerationConfig.from_pretrained(folder).top_p == 0.6


def test_a_report_that_fails_does_not_cost_the_model(config, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "write_report", fail)
    with pytest.raises(OSError, match="No space"):
        train(config)
    assert "trained" in json.loads((config.run_dir / "summary.json").read_text())
    assert (config.run_dir / "model/model.safetensors").is_file()


def test_an_engine_that_cannot_be_closed_does_not_cost_the_results(config, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(run_module.Setup, "__exit__", fail)
        with pytest.raises(OSError, match="No space"):
            train(config)
    assert "trained" in json.loads((config.run_dir / "summary.json").read_text())
    assert "model_step" in train(config, resume=True)


def test_a_longer_run_is_not_finished_by_the_model_of_the_shorter_one(config, monkeypatch) -> None:
    shorter = train(config)
    longer = replace(config, trainer=replace(config.trainer, num_steps=3))
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "export", fail)
        with pytest.raises(OSError, match="No space"):
            train(longer, resume=True)
    summary = train(longer, resume=True)
    assert (shorter["model_step"], summary["model_step"]) == (2, 3)


def test_a_generation_config_that_cannot_be_loaded_is_told_before_any_work(config) -> None:
    set_generation_config(config, {"num_return_sequences": 4})
    with pytest.raises(ConfigError, match="model.path: .*num_return_sequences"):
        train(config)
