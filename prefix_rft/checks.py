"""What is refused, and how: one line that names the argument, what was expected, what came."""


class UserError(Exception):
    """Something the person at the keyboard can put right; the command line prints it as one line.

    Not a ValueError: argument parsers catch those and bury the text in their own.
    """


class ConfigError(UserError):
    """A configuration that cannot run; the message names the key, what was expected, what came."""


def require(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")
