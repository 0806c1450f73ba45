"""A vLLM server on a CPU that gets its weights from trainers in other processes."""

from pathlib import Path

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import save_config
from prefix_rft.config.sections import VLLMConfig
from tests.rollout.rollout_cases import make_requests
from tests.rollout.vllm_cases import TOKEN_FILE, TOLERANCE, check_learnt, learning_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer(server_url, base_dir, tmp_path_factory) -> Path:
    """The configuration of a trainer."""
    folder = tmp_path_factory.mktemp("trainer")
    config = learning_run(folder / "run", base_dir, engine="vllm_server", server_url=server_url)
    save_config(config, folder / "config.toml")
    return folder / "config.toml"


@pytest.fixture(scope="module")
def found(measure, trainer) -> dict:
    return measure("server", trainer)


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


@pytest.mark.slow
def test_no_route_answers_without_the_token(measure, trainer):
    found = measure("routes", trainer, VLLM_SERVER_DEV_MODE="1")
    for known in ("/metrics", "/health", "/docs", "/update_weights", "/collective_rpc", "/pause"):
        assert known in found["paths"]
    assert len(found["paths"]) > 50 and found["sockets"]
    answered = [each for each in found["statuses"] if each[2:] not in ([401, ""], [403, ""])]
    assert answered == []
    assert set(found["known"]) == {200}


def test_trainer_and_server_name_another_token_in_one_line(found, base_dir):
    for error in (found["other_token"], found["no_token"], found["no_token_at_push"]):
        assert "401, expected its token in vllm.token_file or PREFIX_RFT_SERVER_TOKEN" in error
        assert len(error.splitlines()) == 1
    log = (base_dir / "server.log").read_text()
    assert f"the server's token: {base_dir / TOKEN_FILE}" in log
    assert "refused GET '/v1/models' from 127.0.0.1: not the token of vllm.token_file" in log
    assert "refused POST '/inference/v1/generate' from 127.0.0.1: no token" in log
    assert "refused POST '/start_weight_update' from 127.0.0.1: no token" in log


def test_the_token_is_in_no_log(found, base_dir):
    token = (base_dir / TOKEN_FILE).read_text()
    assert len(token) >= 43 and token not in (base_dir / "server.log").read_text()
    assert token not in str(found)


def test_the_rendezvous_of_trainer_and_server_is_on_the_address_between_them(found):
    assert set(found["listens"]) == {"127.0.0.1"}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_learns(measure, server_url, base_dir, tmp_path, num_ranks):
    config = learning_run(tmp_path / "run", base_dir, engine="vllm_server", server_url=server_url)
    save_config(config, tmp_path / "config.toml")
    check_learnt(measure("run", tmp_path / "config.toml", num_ranks=num_ranks))
