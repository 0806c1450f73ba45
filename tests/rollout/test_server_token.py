"""Where the server's token comes from, and what is refused without it.

tests/rollout/test_vllm_server.py asks a server of vLLM.
"""

import asyncio
import os
from pathlib import Path

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, config_from_dict
from prefix_rft.rollout.server_token import (
    TOKEN_VARIABLE,
    RequireToken,
    make_token,
    read_token,
    token_file,
)

TOKEN = "t0ken-of_32.characters~or+more/=="


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_from_dict({"output_dir": str(tmp_path / "run")})


def test_a_start_makes_a_token_that_only_its_owner_can_read(config, tmp_path):
    path = token_file(config)
    assert path == tmp_path / "run/server.token"
    path.parent.mkdir()
    path.write_text(TOKEN)
    path.chmod(0o666)
    mask = os.umask(0)
    try:
        with path.open() as held_open:
            first = make_token(config)
            assert held_open.read() == TOKEN
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(config) == first == path.read_text()
    assert len(first) == 43 and make_token(config) != first


def test_the_file_can_lie_elsewhere(tmp_path):
    path = tmp_path / "keys/token"
    config = config_from_dict({"vllm": {"token_file": str(path)}})
    assert make_token(config) == path.read_text()


def test_the_variable_goes_before_the_file(config, monkeypatch):
    make_token(config)
    token_file(config).unlink()
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert make_token(config) == read_token(config) == TOKEN
    assert not token_file(config).exists()


@pytest.mark.parametrize("token", ["", TOKEN[:31], TOKEN + " ", TOKEN + "\n", "ä" * 40])
def test_a_token_that_cannot_be_sent_or_is_short_is_refused(config, monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    for function in (make_token, read_token):
        with pytest.raises(
            ConfigError, match=f"{TOKEN_VARIABLE}: expected .* at least 32"
        ) as error:
            function(config)
        assert not token or token not in str(error.value)
    with pytest.raises(ConfigError):
        RequireToken(None)


def test_a_file_that_is_missing_or_not_a_token_is_one_clear_error(config):
    with pytest.raises(ConfigError, match=r"prefix-rft serve wrote, got .*server\.token .*copy it"):
        read_token(config)
    token_file(config).parent.mkdir()
    token_file(config).write_text("short")
    with pytest.raises(ConfigError, match=r"server\.token: expected .* got 5 characters"):
        read_token(config)
    token_file(config).unlink()
    token_file(config).mkdir()
    with pytest.raises(ConfigError, match="vllm.token_file: expected a file that can be written"):
        make_token(config)


def ask(monkeypatch: pytest.MonkeyPatch, **scope: object) -> tuple[bool, list[dict]]:
    """Whether the application behind the middleware is reached, and what is sent instead."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    reached, sent = [], []

    async def app(*arguments: object) -> None:
        reached.append(arguments)

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(RequireToken(app)(scope, None, send))
    return bool(reached), sent


HTTP = {"type": "http", "method": "OPTIONS", "path": "/pause\n", "client": ("10.0.0.3", 4)}
SOCKET = {"type": "websocket", "path": "/v1/realtime", "client": None}
STRANGERS = [
    b"Bearer " + TOKEN[:-1].encode(),
    b"Bearer " + TOKEN.encode() + b"x",
    b"Basic " + TOKEN.encode(),
    TOKEN.encode(),
    b"Bearer",
    b"Bearer ",
    b"\xff",
]


@pytest.mark.parametrize("given", [None, *STRANGERS])
def test_requests_without_the_token_reach_nothing(monkeypatch, caplog, given):
    headers = [] if given is None else [(b"authorization", given)]
    reached, (start, body) = ask(monkeypatch, **HTTP, headers=headers)
    assert not reached and start["status"] == 401 and body["body"] == b""
    assert (b"www-authenticate", b"Bearer") in start["headers"]
    reached, (message,) = ask(monkeypatch, **SOCKET, headers=headers)
    assert not reached and message["type"] == "websocket.close"
    reason = (
        "no token" if given is None else "not the token of vllm.token_file or " + TOKEN_VARIABLE
    )
    assert caplog.messages == [
        f"refused OPTIONS '/pause\\n' from 10.0.0.3: {reason}",
        f"refused websocket '/v1/realtime' from an unknown address: {reason}",
    ]


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer"])
def test_requests_with_the_token_and_the_servers_own_events_pass(monkeypatch, scheme):
    headers = [(b"host", b"x"), (b"authorization", scheme + b" " + TOKEN.encode())]
    for scope in (HTTP, SOCKET):
        assert ask(monkeypatch, **scope, headers=headers) == (True, [])
    assert ask(monkeypatch, type="lifespan") == (True, [])


def test_the_middleware_does_not_start_without_a_token():
    with pytest.raises(KeyError, match=TOKEN_VARIABLE):
        RequireToken(None)
