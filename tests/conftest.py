"""Shared fixtures: a tiny random model and a tokenizer of one token a character."""

import json
import os
import socket
import string
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # heeded only before triton, and so transformers, is there

from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefix_rft.config import save_config
from tests.rollout.vllm_cases import (
    PYTHON,
    ROOT,
    TOKEN_FILE,
    environment,
    learning_run,
    skip_without_vllm,
)

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII, one token a character; ids 0 and 1 are <pad> and <eos>."""
    tokens = ["<pad>", "<eos>", "<unk>", *string.printable[:96], "\n"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """A tiny causal language model with random weights far from flat, by its `model_type`."""

    def make(
        model_type: str = "qwen2",
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        **overrides: object,
    ) -> PreTrainedModel:
        options = {
            "vocab_size": 112,  # the lm_head is padded past the tokenizer
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        config = AutoConfig.for_model(model_type, **(options | overrides))
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Qwen2 in float32; its lm_head has more columns than `tiny_tokenizer` has tokens."""
    return make_model()


@pytest.fixture(scope="session")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """A function that runs a scenario of vllm_worker.py, once, and returns what it found."""
    skip_without_vllm()
    ended: dict[tuple, tuple[subprocess.CompletedProcess, Path]] = {}

    def run(scenario: str, *arguments: object, num_ranks: int = 1, **variables: str) -> dict:
        key = (scenario, *arguments, num_ranks, *variables.items())
        if key not in ended:
            out = tmp_path_factory.mktemp(scenario) / "found.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command = ["tests/rollout/vllm_worker.py", scenario, out, *arguments]
            if num_ranks > 1:
                command = [*launcher, num_ranks, *command]
            process = subprocess.run(
                [PYTHON, *map(str, command)],
                cwd=ROOT,
                env=environment() | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
            ended[key] = process, out
        process, out = ended[key]
        is_clean = process.returncode == 0 and "Traceback" not in process.stdout
        assert is_clean, process.stdout[-8000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs with vLLM find the one base."""
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="session")
def server_url(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `prefix-rft serve` for `learning_run`; its log is in `base_dir`."""
    skip_without_vllm()
    folder = tmp_path_factory.mktemp("server")
    save_config(learning_run(folder, base_dir, engine="vllm"), folder / "config.toml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "prefix_rft", "serve", folder / "config.toml", "--port", str(port)]
    url, log = f"http://127.0.0.1:{port}", base_dir / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"{url}/health", base_dir / TOKEN_FILE):
            is_starting = server.poll() is None and time.monotonic() < deadline
            assert is_starting, log.read_text()[-8000:]
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str, token_file: Path) -> bool:
    try:
        headers = {"Authorization": f"Bearer {token_file.read_text()}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5):
            return True
    except (FileNotFoundError, URLError, TimeoutError):
        return False
