"""Arguments that a configuration passes on to vLLM, beside a stand-in of its argument class."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict, load_config, save_config
from prefix_rft.rollout import serve, vllm_options

SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3}


@dataclass
class EngineArgs:
    max_num_seqs: int = 1
    speculative_config: Any = None
    kv_cache_dtype: str = "auto"
    logits_processors: Any = None


@pytest.fixture(autouse=True)
def vllm(monkeypatch) -> None:
    stand_in = SimpleNamespace(EngineArgs=EngineArgs)
    monkeypatch.setattr(vllm_options, "import_vllm", lambda: stand_in)


def options(**further: object) -> dict:
    config = config_from_dict({"vllm": {"options": further}, "loss": {"importance_cap": 2.0}})
    return vllm_options.engine_options(
        config.vllm,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_length=64,
        max_batch_sequences=8,
    )


def test_further_arguments_reach_engine_and_server() -> None:
    made = options(speculative_config=SPECULATIVE)
    assert made["speculative_config"] == SPECULATIVE
    assert {k: v for k, v in made.items() if k != "speculative_config"} == options()
    flags = serve._flags({"speculative_config": SPECULATIVE})
    assert flags == ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']


def test_they_are_in_the_saved_configuration(tmp_path) -> None:
    config = config_from_dict({"vllm": {"options": {"speculative_config": SPECULATIVE}}})
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"speculative_confg": {}}, "no such engine argument; did you mean 'speculative_config'"),
        ({"max_num_seqs": 4}, "vllm.options.max_num_seqs: it follows from the sections"),
        ({"seed": 4}, "vllm.options.seed: it follows from the sections"),
        ({"logits_processors": []}, "it would change what rollouts are sampled from"),
    ],
)
def test_what_vllm_does_not_know_or_we_set_is_refused(further: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**further)


def test_a_quantised_cache_wants_its_log_probs_corrected() -> None:
    values = {"vllm": {"options": {"kv_cache_dtype": "fp8"}}}
    with pytest.raises(ConfigError, match="vllm.options.kv_cache_dtype: expected a correction"):
        config_from_dict(values)
    config_from_dict(values | {"loss": {"importance_cap": 2.0}})
