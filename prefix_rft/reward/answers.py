"""What two cleaned answers say, compared as far as that needs no Math-Verify.

The kinds that Math-Verify decides wrongly are decided here: numbers in whatever spelling, units,
bases, times of day. What is left to it is in a spelling that it reads rightly.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from prefix_rft.data_types import RewardStatus
from prefix_rft.reward.bombs import why_refused
from prefix_rft.reward.elements import elements_agree, read_elements
from prefix_rft.reward.number import Number, read_number
from prefix_rft.reward.spelling import canonical
from prefix_rft.reward.units import split_unit, text_command, unit_of, units_agree

MAX_ANSWER_CHARS = 4096  # a longer answer is wrong without being looked at
MAX_READ_CHARS = 1000  # of an answer whose number and unit are looked for

_scales = {"dozen": 12, "hundred": 100, "thousand": 10**3} | {
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_letter_command = re.compile(r"\\(?:mathrm|text|operatorname) ?\{ ?([ei]) ?\}")
_time = re.compile(
    r"([0-9]{1,2})(?::([0-9]{2}))? ?(?:\\(?:text|mathrm|mbox) ?\{ ?)?([aApP])\.? ?[mM]\.? ?\}?"
)
_clock = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?")
_based = re.compile(
    r"\(?(?=[A-F]*[0-9])([0-9A-F]{1,64})\)? ?"
    r"(?:_ ?(?:\{|\\(?:text|mathrm)| )*|(?:\\text)?[{( ]*(?:in )?base )([0-9]{1,2}|[a-z]+)[ })]*"
)
_base_words = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_bases = {word: base for base, word in enumerate(_base_words, start=2)}

_exponent = re.compile(r"(?<![\w.])((?:[0-9]+\.?|\.(?=[0-9]))[0-9]*)[eE]([+-]?[0-9]+)(?![\w.])")
_bare_pi = re.compile(r"(?<![\\a-zA-Z{])pi(?![a-zA-Z])")
_space_behind_side = re.compile(r"(\\(?:left|right)) (?=[()\[\]|.\\])")
_before_parenthesis = re.compile(r"((?<!\\)sqrt|\\sqrt(?: ?\[[^\]]*\])?|\^) ?\(")


class Answer(NamedTuple):
    """The parts of an answer."""

    text: str  # for Math-Verify
    number: Number | None = None  # without its unit
    unit: frozenset[str] = frozenset()  # its words in one spelling; a base is one too
    minutes: int | None = None  # since midnight, of a time of day


class Decision(NamedTuple):
    """How an answer is graded, and the rule by which."""

    status: RewardStatus
    rule: str  # same_text, too_long, time, unit, number, spelling, refused, math_verify, no_answer


def plain_number(answer: str) -> Number | None:
    """The value of a cleaned answer such as 1,000 or 2 3/4 or 1e-5 cm; None for anything else."""
    return read_answer(answer).number


def decide(gold: str, answer: str) -> Decision | None:
    """Whether two cleaned answers agree, where that can be told without Math-Verify; else None.

    A unit, base or am/pm that only one side names makes no difference; two different ones do.
    """
    if gold == answer:
        return Decision("correct", "same_text")
    if len(answer) > MAX_ANSWER_CHARS:
        return Decision("wrong", "too_long")
    if text_command.sub(r"\1", gold) == text_command.sub(r"\1", answer):
        return Decision("correct", "same_text")
    ours, theirs = read_answer(gold), read_answer(answer)
    if ours.minutes is not None or theirs.minutes is not None:
        return _decision(bool(_minutes(ours) & _minutes(theirs)), "time")
    if not units_agree(ours.unit, theirs.unit):
        return Decision("wrong", "unit")
    if ours.number is not None and theirs.number is not None:
        return _decision(_numbers_agree(ours, theirs), "number")
    if canonical(ours.text) == canonical(theirs.text):
        return Decision("correct", "spelling")
    agree = _compare_elements(ours, theirs)
    if agree is not None:
        return _decision(agree, "elements")
    return Decision("wrong", "refused") if why_refused(theirs.text) else None


def _compare_elements(ours: Answer, theirs: Answer) -> bool | None:
    sides = [read_elements(side.text) if side.number is None else None for side in (ours, theirs)]
    are_known = all(side.number or found for side, found in zip((ours, theirs), sides, strict=True))
    return elements_agree(*sides) if are_known else None


def _decision(agree: bool, rule: str) -> Decision:
    return Decision("correct" if agree else "wrong", rule)


@lru_cache(maxsize=4096)
def read_answer(answer: str) -> Answer:
    """The parts of a cleaned answer."""
    if len(answer) > MAX_READ_CHARS:
        return Answer(answer)
    text = _letter_command.sub(r" \1 ", answer).strip()
    whole = text_command.fullmatch(text)
    if whole and re.match(r" ?[+-]?\.?[0-9]", whole[1]):
        text = whole[1].strip()
    time = _time.fullmatch(text)
    if time and 1 <= int(time[1]) <= 12:
        hour = int(time[1]) % 12 + 12 * (time[3] in "pP")
        return Answer(text, minutes=60 * hour + int(time[2] or 0))
    based = _based.fullmatch(text)
    base = based and (int(based[2]) if based[2].isdigit() else _bases.get(based[2], 0))
    if base and all(int(digit, 36) < base for digit in based[1]):
        digits = based[1].lstrip("0") or "0"
        return Answer(digits, read_number(digits), frozenset((f"base {base}",)))
    return _read_quantity(text)


def _read_quantity(text: str) -> Answer:
    number = read_number(text)
    if number is not None:
        is_whole = number.value.denominator == 1 and not number.is_decimal
        if is_whole and abs(number.value) < 10**18:  # 1625.0 is exact; Math-Verify sees a decimal
            return Answer(str(number.value), number)
        return Answer(_for_math_verify(text), number)
    value, words = split_unit(text)
    number, scale = read_number(value), 1
    while words and words[0] in _scales:
        scale *= _scales[words.pop(0)]
    unit = unit_of(words)
    if scale != 1 or "%" in unit:  # Math-Verify needs to see it
        value = text
    return Answer(_for_math_verify(value), number and number.times(scale), unit)


def _numbers_agree(ours: Answer, theirs: Answer) -> bool:
    """8% is 0.08, and also 8."""
    numbers = ours.number, theirs.number
    if ("%" in ours.unit) != ("%" in theirs.unit):
        hundredth = Fraction(1, 100)
        as_fraction = [
            side.number.times(hundredth if "%" in side.unit else 1) for side in (ours, theirs)
        ]
        return numbers[0].agrees(numbers[1]) or as_fraction[0].agrees(as_fraction[1])
    return numbers[0].agrees(numbers[1])


def _minutes(answer: Answer) -> set[int]:
    """The times of day that it may be: 4:30 is 4:30 am or pm; none where it is no time."""
    clock = _clock.fullmatch(answer.text)
    if answer.minutes is not None:
        return {answer.minutes}
    if not clock:
        return set()
    minutes = 60 * int(clock[1]) + int(clock[2] or 0)
    return {minutes} if minutes >= 780 else {minutes % 720, minutes % 720 + 720}


def _for_math_verify(text: str) -> str:
    r"""`text` with 1e5 as (1 \times 10^{5}), and braces for the parentheses of a root or power."""
    text = _exponent.sub(r"(\1 \\times 10^{\2})", text)
    text = _space_behind_side.sub(r"\1", _bare_pi.sub(r"\\pi ", text))
    start = 0
    while opening := _before_parenthesis.search(text, start):
        start = opening.end()
        end = _closing(text, start)
        if end is not None:
            command = "\\sqrt" if opening[1] == "sqrt" else opening[1]
            text = f"{text[: opening.start()]}{command}{{{text[start:end]}}}{text[end + 1 :]}"
            start = opening.start() + len(command) + 1
    return text


def _closing(text: str, start: int) -> int | None:
    """Where the parenthesis that is open at `start` closes."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return None
