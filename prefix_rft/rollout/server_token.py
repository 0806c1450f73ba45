"""The bearer token that every request to the server of `prefix-rft serve` carries."""

import logging
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config

TOKEN_VARIABLE = "PREFIX_RFT_SERVER_TOKEN"
TOKEN_SOURCES = f"vllm.token_file or {TOKEN_VARIABLE}"
_TOKEN_FILE = "server.token"
_NUM_BYTES = 32  # random bytes in a token
_Message = MutableMapping[str, Any]

_log = logging.getLogger("uvicorn.error")  # the server's; vLLM silences others


def token_file(config: Config) -> Path:
    """Where the server writes its token and a trainer with the same configuration reads it."""
    return Path(config.vllm.token_file or config.run_dir / _TOKEN_FILE)


def make_token(config: Config) -> str:
    """The token of a server that starts: that of the environment, or a new one, written to a file.

    Raises:
        ConfigError: the variable holds no token, or the file cannot be written.
    """
    token = _token_in_environment()
    if token is not None:
        return token
    path, token = token_file(config), secrets.token_urlsafe(_NUM_BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an existing file would keep its mode and its readers
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    except OSError as error:
        raise ConfigError(
            f"vllm.token_file: expected a file that can be written, got {path} ({error.strerror})"
        ) from error
    return token


def read_token(config: Config) -> str:
    """The token of the server that a trainer asks: that of the environment, or of the file.

    Raises:
        ConfigError: there is none.
    """
    token = _token_in_environment()
    if token is not None:
        return token
    path = token_file(config)
    try:
        return _checked(path.read_text().strip(), str(path))
    except OSError as error:
        raise ConfigError(
            f"vllm.token_file: expected the file that prefix-rft serve wrote, got {path} "
            f"({error.strerror}): copy it here, or set {TOKEN_VARIABLE} on both sides"
        ) from error


def _token_in_environment() -> str | None:
    token = os.environ.get(TOKEN_VARIABLE)
    return None if token is None else _checked(token, TOKEN_VARIABLE)


def _checked(token: str, source: str) -> str:
    """`token`, which no message repeats; a ConfigError if it is short or no bearer token."""
    if not re.fullmatch(r"[\w.~+/=-]{32,}", token, re.ASCII):
        raise ConfigError(
            f"{source}: expected a token of at least 32 letters, digits or -._~+/=, "
            f"got {len(token)} characters"
        )
    return token


class RequireToken:
    """ASGI middleware that answers no request, of whatever path or method, without the token.

    It guards all that stands behind it: HTTP, websockets, mounted applications and unknown paths.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._token = _checked(os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE).encode()

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        """Answer with status 401, or refuse the handshake, unless the token is there."""
        if scope["type"] == "lifespan":  # the server's own start and end
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization")
        scheme, _, token = (given or b"").partition(b" ")
        if scheme.lower() == b"bearer" and secrets.compare_digest(token, self._token):
            return await self._app(scope, receive, send)
        _log.warning(
            "refused %s %r from %s: %s",
            scope.get("method", scope["type"]),
            scope["path"],
            (scope.get("client") or ["an unknown address"])[0],
            "no token" if given is None else f"not the token of {TOKEN_SOURCES}",
        )
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})  # policy violation
        headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
