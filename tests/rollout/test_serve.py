"""The command that `prefix-rft serve` executes; tests/rollout/test_vllm_server.py runs it."""

import json
import socket

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict, packages
from prefix_rft.rollout import serve
from tests.tiny import make_run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments with which a call replaces the process."""
    arguments: list[str] = []
    monkeypatch.setattr(serve, "import_vllm", lambda: None)
    monkeypatch.setattr(serve.os, "execve", lambda program, argv, variables: arguments.extend(argv))
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
