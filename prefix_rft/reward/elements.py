r"""Lists, sets and tuples of numbers, compared element by element.

Math-Verify makes a set of every list, and so takes 16, 3, 1, 1 for 16, 3, 1.
"""

import re
from typing import NamedTuple

from prefix_rft.reward.number import Number, read_number

# 1,234 is a number or two.
_ambiguous = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:\{,\}|,)[0-9]{3}(?![0-9])")
_separator = re.compile(
    r" ?[,;] ?(?:(?:and|or) |\\text ?\{ ?(?:and|or) ?\} ?)?"
    r"| (?:and|or) | ?\\text ?\{ ?(?:and|or) ?\} ?"
)
_bracket = re.compile(r"\\left ?|\\right ?")
_name = re.compile(r"([a-zA-Z]) ?= ?")


class Elements(NamedTuple):
    kind: str  # "list" in any order, "set" without repetitions, "tuple" in order
    texts: tuple[str, ...]
    numbers: tuple[Number, ...] | None  # where all of them are numbers


def read_elements(text: str) -> Elements | None:
    """The elements of an answer; None for one that is no list, set or tuple."""
    if not _separator.search(text) or _ambiguous.search(text):
        return None
    text = _bracket.sub("", text).strip()
    name = _name.match(text)
    inside = text[name.end() :] if name else text
    kind = "list"
    if inside.startswith("\\{") and inside.endswith("\\}"):
        kind, inside = "set", inside[2:-2]
    elif inside.startswith("(") and inside.endswith(")") and _closes_last(inside):
        kind, inside = "tuple", inside[1:-1]
    texts = _split(inside)
    if texts is None or len(texts) < 2 or not all(texts):
        return None
    if name and kind == "list" and all(text.startswith(name[0]) for text in texts[1:]):
        texts = [texts[0], *(text[name.end() :].strip() for text in texts[1:])]
    numbers = tuple(map(read_number, texts))
    return Elements(kind, tuple(texts), None if None in numbers else numbers)


def elements_agree(ours: Elements | None, theirs: Elements | None) -> bool | None:
    """Whether two collections agree; None where that cannot be told.

    Without one of them (None), the other side is a single number.
    """
    if ours is None or theirs is None:
        single = ours or theirs
        is_told = single.numbers and any(n.value != single.numbers[0].value for n in single.numbers)
        return False if is_told else None
    if "tuple" in (ours.kind, theirs.kind) and ours.kind != theirs.kind:
        return None
    if ours.numbers is None or theirs.numbers is None:
        is_plain = "set" not in (ours.kind, theirs.kind) and not any(
            re.search(r"\\[pm][mp](?![a-z])", text) for text in (*ours.texts, *theirs.texts)
        )
        return False if is_plain and len(ours.texts) != len(theirs.texts) else None
    left, right = ours.numbers, theirs.numbers
    if "set" in (ours.kind, theirs.kind):
        left, right = _once(left), _once(right)
    if ours.kind != "tuple":
        left, right = sorted(left), sorted(right)
    return len(left) == len(right) and all(a.agrees(b) for a, b in zip(left, right, strict=True))


def _once(numbers: tuple[Number, ...]) -> tuple[Number, ...]:
    return tuple({number.value: number for number in numbers}.values())


def _split(text: str) -> list[str] | None:
    """The parts between separators outside of brackets; None with brackets that do not close."""
    parts, start, depth = [], 0, 0
    separators = {match.start(): match.end() for match in _separator.finditer(text)}
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return None
        if i in separators and i >= start and depth == 0:
            parts.append(text[start:i].strip())
            start = separators[i]
    return None if depth else [*parts, text[start:].strip()]


def _closes_last(text: str) -> bool:
    """Whether the bracket that comes first closes at the end."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False
