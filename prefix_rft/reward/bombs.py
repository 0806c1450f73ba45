r"""What Math-Verify is not asked about: answers that would only use up its time and memory.

Refused, as wrong unless it is the gold answer to the letter, is an answer with

- more than 2,000 characters, 300 cells or elements, or brackets 40 deep;
- a number of more than 100,000 digits once it is worked out: towers of powers, factorials, powers
  of powers, `\exp` of `\exp`, binomials, sums and products of that many terms. What is counted is a
  bound from above: numbers next to each other count as their product;
- letters in five storeys of powers;
- program code or TeX that reads, writes or defines.
"""

import math
import re
from typing import NamedTuple

MAX_CHARS = 2000
MAX_CELLS = 300
MAX_DEPTH = 40
MAX_DIGITS = 100_000
MAX_STOREYS = 4

_code = re.compile(
    r"__|\\(?:input|include|write|immediate|def|newcommand|catcode|csname)(?![a-z])"
    r"|\b(?:import|lambda|eval|exec) ?[(a-z'\"]|\b(?:range|open|print) ?\("
)
_cell = re.compile(r"[&,;]|\\\\|\\cup| or |=")
_token = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<power>\^|\*\*)|(?P<open>[({\[]|\\\{)"
    r"|(?P<close>[)}\]]|\\\})|(?P<factorial>!)|\\(?P<command>[a-zA-Z]+)|(?P<word>[a-zA-Z]+)"
)
# Commands and words that stand for no variable; \pi and e are numbers of one digit.
_constants = frozenset(("pi", "e"))
_plain = frozenset(
    "frac dfrac tfrac cfrac cdot times div left right sqrt pm mp sin cos tan ln log arcsin arccos "
    "arctan mathrm text big Big bigg Bigg displaystyle infty".split()
)
_factorials = frozenset("Gamma gamma factorial binom dbinom tbinom binomial".split())


class _Size(NamedTuple):
    """A bound for a part of an answer."""

    digits: int = 0  # of the numbers in it, once they are worked out
    has_letters: bool = False
    storeys: int = 0  # of powers
    value: int | None = None  # of a single number, rounded up


class _TooLarge(Exception):
    pass


def why_refused(text: str) -> str | None:
    """What is wrong with an answer that Math-Verify shall not see; None for one that it may."""
    if len(text) > MAX_CHARS:
        return f"more than {MAX_CHARS} characters"
    if sum(1 for _ in _cell.finditer(text)) > MAX_CELLS:
        return f"more than {MAX_CELLS} cells"
    depth = deepest = 0
    for char in text:
        depth += (char in "({[") - (char in ")}]")
        deepest = max(deepest, abs(depth))
    if deepest > MAX_DEPTH:
        return f"brackets more than {MAX_DEPTH} deep"
    if _code.search(text):
        return "program code"
    try:
        _Reader(text).rest()
    except _TooLarge as error:
        return str(error)
    return None


class _Reader:
    """Goes through an answer once, from left to right."""

    def __init__(self, text: str) -> None:
        self._tokens = [
            (match.lastgroup, match[match.lastgroup]) for match in _token.finditer(text)
        ]
        self._next = self._depth = 0

    def rest(self) -> _Size:
        """The size of what comes up to the bracket that closes, or the end."""
        total = _Size()
        num_parts = 0
        while (kind := self._kind()) is not None:
            if kind == "close":
                self._next += 1
                break
            if kind in ("factorial", "power"):  # with nothing before it
                self._next += 1
                continue
            if self._tokens[self._next] == ("command", "choose"):
                self._next += 1
                _factorial(total)
                continue
            part = self._part()
            num_parts += 1
            total = _Size(
                total.digits + part.digits,
                total.has_letters or part.has_letters,
                max(total.storeys, part.storeys),
                part.value if num_parts == 1 else None,
            )
            _check(total)
        return total

    def _kind(self) -> str | None:
        return self._tokens[self._next][0] if self._next < len(self._tokens) else None

    def _part(self) -> _Size:
        """A number, letter or group, with the factorials and powers behind it."""
        self._depth += 1
        if self._depth > 2 * MAX_DEPTH:
            raise _TooLarge(f"more than {MAX_DEPTH} levels")
        size = self._atom()
        while self._kind() == "factorial":
            self._next += 1
            size = _factorial(size)
        if self._kind() == "power":
            self._next += 1
            kind = self._kind()
            exponent = self._part() if kind not in (None, "close", "power") else _Size(1)
            size = _power(size, exponent)
        self._depth -= 1
        return size

    def _atom(self) -> _Size:
        kind, text = self._tokens[self._next]
        self._next += 1
        if kind == "number":
            value = math.ceil(float(text)) if len(text) < 16 else None
            return _Size(len(text), value=value)
        if kind == "open":
            return self.rest()
        if text in _factorials or text == "exp":
            argument = self._part() if self._kind() not in (None, "close", "power") else _Size(1)
            return _factorial(argument) if text in _factorials else _power(_Size(1), argument)
        if text in _constants:
            return _Size(1)
        return _Size(0) if kind == "command" and text in _plain else _Size(1, has_letters=True)


def _value(size: _Size) -> int:
    """A bound for the value of numbers with that many digits."""
    return 10 ** min(size.digits, 20) if size.value is None else size.value


def _factorial(size: _Size) -> _Size:
    if size.has_letters and size.digits < 5:
        return size
    # n! has at most n times the digits of n.
    return _check(_Size(_value(size) * size.digits, size.has_letters, size.storeys))


def _power(base: _Size, exponent: _Size) -> _Size:
    storeys = max(base.storeys, exponent.storeys + 1)
    has_letters = base.has_letters or exponent.has_letters
    if exponent.has_letters:
        return _check(_Size(base.digits + exponent.digits, True, storeys))
    digits = max(1, base.digits) * max(1, _value(exponent))
    if base.value is not None and exponent.value is not None and digits < 20:
        return _Size(digits, has_letters, storeys, base.value**exponent.value)
    return _check(_Size(digits, has_letters, storeys))


def _check(size: _Size) -> _Size:
    if size.digits > MAX_DIGITS:
        raise _TooLarge(f"a number of more than {MAX_DIGITS} digits")
    if size.storeys > MAX_STOREYS:
        raise _TooLarge(f"more than {MAX_STOREYS} storeys of powers")
    return size
