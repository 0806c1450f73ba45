"""The command that `prefix-rft serve` executes; tests/rollout/test_vllm_server.py runs it."""

import json
import socket

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict, packages
from prefix_rft.rollout import serve
from prefix_rft.rollout.server_token import TOKEN_VARIABLE, RequireToken
from tests.tiny import make_run


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment with which a call replaces the process."""
    return {}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> list[str]:
    """The arguments with which a call replaces the process."""
    arguments: list[str] = []

    def replace_process(program: str, argv: list[str], variables: dict[str, str]) -> None:
        arguments.extend(argv)
        environment.update(variables)

    monkeypatch.setattr(serve, "import_vllm", lambda: None)
    monkeypatch.setattr(serve.os, "execve", replace_process)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return arguments


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_on_cuda_weights_come_over_nccl(tmp_path, monkeypatch, command):
    """Only the options are checked; nothing here runs vLLM on CUDA."""
    monkeypatch.setattr(serve, "resolve_device", lambda config: torch.device("cuda"))
    config = make_run(tmp_path, vllm={"tensor_parallel_size": 2, "gpu_memory_utilization": 0.9})
    port = free_port()
    serve.serve_vllm(config, host="127.0.0.1", port=port)
    given = dict(zip(command, command[1:], strict=False))
    assert given["--weight-transfer-config"] == json.dumps({"backend": "nccl"})
    assert given["--tensor-parallel-size"] == "2" and given["--gpu-memory-utilization"] == "0.9"
    assert given["--max-model-len"] == "48" and given["--port"] == str(port)
    assert given["--logprobs-mode"] == "processed_logprobs"
    for absent in ("--worker-extension-cls", "--no-enable-chunked-prefill", "None"):
        assert absent not in command
    written = json.loads((config.run_dir / "engine" / "config.json").read_text())
    assert written["head_dtype"] == "float32"
    assert (
        written["vocab_size"]
        < json.loads((tmp_path / "base/config.json").read_text())["vocab_size"]
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_no_server_is_without_a_token(tmp_path, monkeypatch, command, environment, capsys, host):
    monkeypatch.setattr(serve, "resolve_device", lambda config: torch.device("cuda"))
    monkeypatch.setenv("VLLM_API_KEY", "another")
    config, port = make_run(tmp_path), free_port()
    serve.serve_vllm(config, host=host, port=port)
    token = (config.run_dir / "server.token").read_text()
    assert environment[TOKEN_VARIABLE] == token and environment["VLLM_API_KEY"] == ""
    given = dict(zip(command, command[1:], strict=False))
    assert given["--middleware"] == f"{RequireToken.__module__}.RequireToken"
    assert token not in " ".join(command)
    assert capsys.readouterr().out == f"the server's token: {config.run_dir / 'server.token'}\n"

    command.clear()
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    with pytest.raises(ConfigError, match="PREFIX_RFT_SERVER_TOKEN: expected a token"):
        serve.serve_vllm(config, host=host, port=port)
    assert command == []


def test_a_taken_port_is_one_clear_error(tmp_path, command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: expected a free port .* got {port}"):
            serve.serve_vllm(make_run(tmp_path), host="127.0.0.1", port=port)
    assert command == []


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[vllm\]'"):
        serve.serve_vllm(config_from_dict({}), host="127.0.0.1", port=free_port())
