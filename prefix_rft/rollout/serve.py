"""The server of vLLM behind `rollout.engine = "vllm_server"`."""

import json
import os
import socket
import sys

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config
from prefix_rft.data import resolve_base
from prefix_rft.model import (
    load_model_config,
    load_tokenizer,
    resolve_autocast_dtype,
    resolve_device,
    resolve_weight_dtypes,
    vocabulary_size,
)
from prefix_rft.rollout.make_engine import max_sequence_length
from prefix_rft.rollout.server_token import TOKEN_VARIABLE, RequireToken, make_token, token_file
from prefix_rft.rollout.vllm_options import (
    engine_options,
    import_vllm,
    sequence_limit,
    unties_weights,
    weight_dtype,
    write_model_config,
)

ENGINE_FOLDER = "engine"
_SERVER = "vllm.entrypoints.openai.api_server"


def serve_vllm(config: Config, *, host: str, port: int) -> None:
    """Replace this process with the server, which has no weights until a trainer sends them.

    It answers only requests that carry its token.

    Raises:
        ConfigError: vLLM is not installed or cannot run the model, the port is taken, or the token
            cannot be used or written.
    """
    import_vllm()
    _check_port(host, port)
    base, device = resolve_base(config), resolve_device(config.model)
    model_config = load_model_config(config.model, base)
    folder = config.run_dir / ENGINE_FOLDER
    write_model_config(
        model_config,
        folder,
        vocab_size=vocabulary_size(load_tokenizer(base)),
        unties=unties_weights(device),
    )
    trained, _ = resolve_weight_dtypes(config.model)
    options = engine_options(
        config.vllm,
        device=device,
        dtype=weight_dtype(resolve_autocast_dtype(config.model) or trained),
        max_length=sequence_limit(model_config, max_sequence_length(config)),
        max_batch_sequences=config.rollout.max_batch_sequences,
    )
    options |= {
        "host": host,
        "port": port,
        "enable_scale_out": True,  # adds the route that takes and returns token ids
        "disable_uvicorn_access_log": True,
        "middleware": _import_path(RequireToken),
    }
    backend = "nccl"
    if device.type != "cuda":
        from prefix_rft.rollout.vllm_gloo import BACKEND as backend
        from prefix_rft.rollout.vllm_gloo import WorkerExtension

        options["worker_extension_cls"] = _import_path(WorkerExtension)
    options["weight_transfer_config"] = f'{{"backend": "{backend}"}}'
    # The `vllm` command needs a distribution of that name, which a custom build may not have.
    command = [sys.executable, "-m", _SERVER, "--model", str(folder)]
    token = make_token(config)
    where = TOKEN_VARIABLE if TOKEN_VARIABLE in os.environ else token_file(config)
    print(f"the server's token: {where}", flush=True)
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that take weights
        "VLLM_API_KEY": "",  # vLLM's own guards few routes, and would refuse our token there
        TOKEN_VARIABLE: token,
    }
    os.execve(sys.executable, [*command, *_flags(options)], environment)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"port: expected a free port on {host}, got {port} ({error.strerror})"
        ) from error


def _import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _flags(options: dict[str, object]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            flags += [f"--{flag}", text]
    return flags
