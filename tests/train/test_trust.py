"""Code that lies in a model folder is never run, whatever is typed at a prompt."""

import json
from pathlib import Path

import pytest

from prefix_rft import cli
from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, save_config
from prefix_rft.model import load_tokenizer
from prefix_rft.train.run import evaluate_model
from tests.tiny import make_run


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Config:
    """Of a base with a file of code, which leaves a trace when it is run."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = make_run(tmp_path)
    code = f"open({str(tmp_path / 'was_run')!r}, 'w')\n"
    (Path(config.model.path) / "code.py").write_text(code)
    return config


def update(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_code_of_a_model_is_not_run(config, tmp_path, capsys) -> None:
    update(
        Path(config.model.path) / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"},
    )
    expected = "model.path: the model of .* is code of its own .*, which is never run"
    with pytest.raises(ConfigError, match=expected):
        evaluate_model(config, config.model.path)
    save_config(config, tmp_path / "run.toml")
    assert cli.main(["doctor", str(tmp_path / "run.toml")]) == 2
    assert "custom code" in capsys.readouterr().err
    assert not (tmp_path / "was_run").exists()


def test_the_code_of_a_tokenizer_is_not_run(config, tmp_path) -> None:
    update(
        Path(config.model.path) / "tokenizer_config.json",
        tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": [None, "code.MyTokenizer"]},
    )
    load_tokenizer(config.model.path)  # by what tokenizer.json says
    (Path(config.model.path) / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="model.path: .*tokenizer"):
        load_tokenizer(config.model.path)
    assert not (tmp_path / "was_run").exists()
