"""The unit behind a value: where it starts, and whether two are the same."""

import re
from collections.abc import Iterable

from prefix_rft.reward.number import read_number

_TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf) ?\{[^{}]*\}"
_DEGREE = r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree"
_POWER = r"\^ ?(?:\{ ?-?[0-9] ?\}|-?[0-9])"
_WORD = rf"[a-zA-Z]+(?:{_POWER}|[23])?"
text_command = re.compile(_TEXT.replace("[^{}]*", "([^{}]*)"))
_in_latex = re.compile(
    rf" ?(?:{_TEXT}|{_DEGREE}|\\?%)(?: |{_TEXT}|{_DEGREE}|{_POWER}|/|\\cdot|[CF]\b)*$"
)
_in_words = re.compile(rf"(?<=[0-9}})])( ?){_WORD}(?:[ /]{_WORD})*$")
_fraction = re.compile(
    rf"\\[dtc]?frac ?\{{ ?({_TEXT}(?: ?{_POWER})?) ?\}} ?\{{ ?({_TEXT}(?: ?{_POWER})?) ?\}}"
)
_part = re.compile(r"[a-zA-Z]+|[/%]|-?[0-9]")
_open_end = re.compile(r"(?:[-+*/^_=<>,(\[{&]|\\(?:times|cdot|div|pm|cup|cap|[dtc]?frac|sqrt))$")
_no_unit = re.compile(
    r"(?:and|or|plus|minus|times|over|factorial|hal(?:f|ves)|quarters?|infinity|\w+ths?|thirds?)"
)
_names = {
    word: name
    for name, words in {
        "mm": "millimeter millimetre",
        "cm": "centimeter centimetre",
        "m": "meter metre mtr",
        "km": "kilometer kilometre",
        "inch": "inches in",
        "ft": "foot feet",
        "yd": "yard",
        "mile": "mi",
        "mg": "milligram",
        "g": "gram gm",
        "kg": "kilogram",
        "lb": "pound",
        "oz": "ounce",
        "ml": "milliliter millilitre mL",
        "l": "liter litre L",
        "gal": "gallon",
        "ms": "millisecond",
        "s": "second sec",
        "min": "minute",
        "h": "hour hr",
        "day": "",
        "yr": "year",
        "mile / h": "mph",
        "km / h": "kmh kph kmph",
        "degree": "deg circ",
        "rad": "radian",
        "dollar": "usd",
        "cent": "",
        "N": "newton",
        "J": "joule",
        "W": "watt",
        "V": "volt",
        "Pa": "pascal",
        "Hz": "hertz",
        "K": "kelvin",
        "%": "percent percentage pct",
        "/": "per -1",
        "^2": "square sq squared 2",
        "^3": "cubic cu cubed 3",
        "/ ^2": "-2",
        "/ ^3": "-3",
    }.items()
    for word in (name, *words.split())
}
_letters = frozenset("mghsLl")  # that are a unit also without \text
_fillers = frozenset(("of", "the", "a", "an", "in", "total"))
_operators = frozenset(("/", "^2", "^3"))


def split_unit(text: str) -> tuple[str, list[str]]:
    """The value and the words behind it; no words where they belong to the value."""
    text = _fraction.sub(r" \1/\2", text)
    tail = _in_latex.search(text) or _in_words.search(text)
    value = text[: tail.start()].rstrip() if tail else ""
    if not value or _open_end.search(value):
        return text, []
    words = _part.findall(text_command.sub(r" \1 ", tail[0]))
    if any(map(_no_unit.fullmatch, words)):
        return text, []
    if tail.re is _in_words:
        is_number = read_number(value) is not None
        # Behind a number the first word shows what they are: 10 years old.
        checked = words[:1] if is_number and tail[1] else words
        if not all(_is_unit(word, is_number=is_number, is_apart=bool(tail[1])) for word in checked):
            return text, []
    return value, words


def unit_of(words: Iterable[str]) -> frozenset[str]:
    """The words of a unit in one spelling, singular: cm and ^2 for square centimeters."""
    names = (part for word in words for part in _name(word).split())
    return frozenset(name for name in names if name not in _fillers)


def units_agree(ours: frozenset[str], theirs: frozenset[str]) -> bool:
    """Whether one is left out, or they are the same; 18 eggs are 18 fresh eggs."""
    if not ours or not theirs or ours == theirs:
        return True
    return (ours < theirs or theirs < ours) and not (ours ^ theirs) & _operators


def _is_unit(word: str, *, is_number: bool, is_apart: bool) -> bool:
    r"""Whether a word without \text behind a value is no product of variables."""
    if len(word) == 1:
        return word in _letters and (is_number or is_apart) or not word.isalpha()
    return _name(word) in _names or (is_number and is_apart and len(word) > 3)


def _name(word: str) -> str:
    lower = word.lower()
    for form in (word, lower, lower.removesuffix("s")):
        if form in _names:
            return _names[form]
    return re.sub(r"(?<=[xh])es$|(?<=ss)es$|s$", "", lower) or lower
