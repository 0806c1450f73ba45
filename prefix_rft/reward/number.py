"""The exact value of a number in whatever spelling."""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_NUMBER_CHARS = 64
MAX_EXPONENT = 4096
RELATIVE_TOLERANCE = Fraction(1, 10**6)  # between two numbers, one of them a decimal

# Spaces are single, as `clean_answer` leaves them.
_DECIMAL = (
    r"[+-]? ?(?=\.?[0-9])(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\{,\}[0-9]{3})+|(?: [0-9]{3})+)|[0-9]*)"
    r"(?:\.[0-9]*)?"
)
_INTEGER = r"\{? ?[+-]?[0-9]+ ?\}?"
_PART = rf"(?:\{{ ?({_DECIMAL}) ?\}}| ?([0-9]))"
_scientific = re.compile(
    rf"({_DECIMAL})(?: ?(?:\\times|\\cdot|\*|[xX]) ?10 ?(?:\^|\*\*) ?({_INTEGER})"
    r"|[eE]([+-]?[0-9]+))?"
)
_power_of_ten = re.compile(rf"([+-]?) ?10 ?(?:\^|\*\*) ?({_INTEGER})")
_fraction = re.compile(rf"([+-]?) ?(?:\\[dtc]?frac{_PART}{_PART}|({_DECIMAL}) ?/ ?({_DECIMAL}))")
_mixed = re.compile(r"([+-]?) ?([0-9]+)((?: [0-9]+ ?/ ?[0-9]+| ?\\[dtc]?frac.*))")
_repeating = re.compile(r"([+-]?) ?([0-9]*)\.([0-9]*) ?\\(?:overline|bar) ?\{ ?([0-9]+) ?\}")


class Number(NamedTuple):
    value: Fraction
    is_decimal: bool  # written with digits behind the point: compared with a tolerance

    def agrees(self, other: "Number") -> bool:
        """Whether they are equal, or, with a decimal among them, nearly so."""
        a, b = self.value, other.value
        if not (self.is_decimal or other.is_decimal):
            return a == b
        return abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b))

    def times(self, factor: Fraction | int) -> "Number":
        return Number(self.value * factor, self.is_decimal)


def read_number(text: str) -> Number | None:
    """The value of a decimal, repeating too, a fraction, a mixed number, or scientific notation."""
    text = text.strip()
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if match := _scientific.fullmatch(text):
        return _number(match[1], match[2] or match[3])
    if match := _power_of_ten.fullmatch(text):
        return _number(f"{match[1]}1", match[2])
    if match := _fraction.fullmatch(text):
        above, below = (_number(part) for part in match.groups()[1:] if part)
        if not below.value:
            return None
        value = above.value / below.value
        is_decimal = above.is_decimal or below.is_decimal
        return Number(-value if match[1] == "-" else value, is_decimal)
    if match := _repeating.fullmatch(text):
        sign, *digits = match.groups()
        once, whole = int(f"0{digits[0]}{digits[1]}"), int("0" + "".join(digits))
        value = Fraction(whole - once, 10 ** len(digits[1]) * (10 ** len(digits[2]) - 1))
        return Number(-value if sign == "-" else value, False)
    if match := _mixed.fullmatch(text):
        part = read_number(match[3])
        if part is not None and not part.is_decimal and part.value >= 0:
            value = int(match[2]) + part.value
            return Number(-value if match[1] == "-" else value, False)
    return None


def _number(decimal: str, exponent: str | None = None) -> Number | None:
    value = Fraction(re.sub(r"[{}, ]", "", decimal).removesuffix("."))
    power = int(exponent.strip("{} ")) if exponent else 0
    if abs(power) > MAX_EXPONENT:
        return None
    return Number(value * Fraction(10) ** power, value.denominator != 1 or power < 0)
