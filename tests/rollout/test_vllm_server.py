"""A vLLM server on a CPU that gets its weights from trainers in other processes."""

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import save_config
from prefix_rft.config.sections import VLLMConfig
from tests.rollout.rollout_cases import make_requests
from tests.rollout.vllm_cases import TOLERANCE, check_learnt, learning_run


@pytest.fixture(scope="module")
def found(measure, server_url, base_dir, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("trainer")
    config = learning_run(folder / "run", base_dir, engine="vllm_server", server_url=server_url)
    save_config(config, folder / "config.toml")
    return measure("server", folder / "config.toml")


def test_log_probs_are_those_of_the_weights_sent_last(found):
    assert found["gap"] < TOLERANCE
    assert found["gap_followed"] < TOLERANCE
    assert found["gap_theirs"] < TOLERANCE


def test_a_weight_is_gathered_on_the_stream_that_sends_it(found):
    assert found["in_advance"] == 0


def test_stale_or_no_weights_are_refused(found):
    assert "the engine holds none" in found["before_push"]
    assert "asked for version 1, the engine holds version 0" in found["stale"]
    assert "stale weights" in found["faked"]
    assert "another trainer sends weights to it" in found["others"]


def test_completions_keep_to_their_requests(found):
    requests = make_requests(32)
    assert found["told"]
    for request, (ids, log_probs, reason) in zip(requests, found["completions"], strict=True):
        assert 0 < len(ids) == len(log_probs) <= request.max_new_tokens
        assert reason == "stop" or len(ids) == request.max_new_tokens
    assert {reason for _, _, reason in found["completions"]} == {"stop", "length"}
    assert found["repeated"] and not found["other_seed"]


def test_greedy_completions_are_those_of_the_transformers_engine(found):
    assert found["greedy"]


def test_a_server_that_does_not_fit_or_answer_is_one_clear_error(found):
    assert "a server for sequences of 199 tokens, got one for 200" in found["other_limit"]
    assert "vLLM at http://127.0.0.1:9 did not generate" in found["gone"]
    assert "vLLM at http://127.0.0.1:9 did not accept the weights" in found["gone_at_push"]
    with pytest.raises(ConfigError, match="vllm.server_url: expected http://host:port"):
        VLLMConfig(server_url="localhost:8000")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_learns(measure, server_url, base_dir, tmp_path, num_ranks):
    config = learning_run(tmp_path / "run", base_dir, engine="vllm_server", server_url=server_url)
    save_config(config, tmp_path / "config.toml")
    check_learnt(measure("run", tmp_path / "config.toml", num_ranks=num_ranks))
