"""Chains of operations on a row of dice, in tiers of difficulty: the dataset `tiers`. Pure.

A problem is a row of 4 dice, written as a number, and a chain of named operations. The row has so
many values that a guess is rarely right. What tells methods apart is the tier of a problem:

- `easy`, `medium`, `hard`: longer and longer chains. As on the testbed the base works through a
  problem when the prompt asks for the steps; unasked it often does so on easy problems, rarely on
  medium ones, and guesses the answer of hard ones.
- `skill`: chains with `flip`, an operation in no text that the base learns from. Its rule stands
  only in demonstrations: whoever has to find it by sampling needs all dice right, several times
  in one response.
- `beyond`: chains longer than any other, half of them with `flip`; only held out.

All operations are one-to-one, so a demonstration with one wrong result has a wrong answer.
"""

import random
import string
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from prefix_rft.checks import ConfigError
from prefix_rft.config import TiersConfig

TiersRow = dict[str, str | int | bool]

TIERS = ("easy", "medium", "hard", "skill", "beyond")
SKILL = "flip"
SKILL_TIER = "skill"
_WITHOUT_SKILL = ("easy", "medium", "hard")
VOCABULARY = (f" {SKILL}",)  # one token for what no lesson has
_NUM_FLIPS = (2, 3)  # in a problem that has any
_NUM_DICE = 4
_FACES = "123456"
_ASKED = " Show the steps."
_ATTEMPTS = 100  # draws per row before we conclude that there are too few different problems


def _over(dice: str) -> str:
    """The faces on the other side."""
    return "".join(str(7 - int(die)) for die in dice)


_KNOWN: dict[str, Callable[[str], str]] = {
    "turn": lambda value: value[1:] + value[0],
    "swap": lambda value: value[1] + value[0] + value[2:],
    "up": lambda value: _FACES[int(value[0]) % 6] + value[1:],  # 6 becomes 1
    "over": lambda value: _over(value[0]) + value[1:],
}
_OPERATIONS = _KNOWN | {SKILL: _over}


class _Draft(NamedTuple):
    start: str
    names: tuple[str, ...]  # the operations
    tier: str


def make_row(
    start: str, names: Sequence[str], tier: str, wrong: tuple[int, str] | None = None
) -> TiersRow:
    """One problem: {"prompt", "answer", "demonstration", "num_steps", "tier", "is_wrong"}.

    Args:
        start: 4 digits from 1 to 6.
        names: operations, of `turn`, `swap`, `up`, `over` and `flip`.
        wrong: (k, value) lets the demonstration give `value` as the result of operation k, counted
            from 0, and go on from there.
    """
    answer = _results(start, names)[-1]
    if wrong is None:
        shown = _results(start, names)
    else:
        place, value = wrong
        before, after = names[:place], names[place + 1 :]
        shown = [*_results(start, before), value, *_results(value, after)]
    labelled = [
        f" {label} {name}" for label, name in zip(_labels(start, names), names, strict=True)
    ]
    worked = "".join(f"{step}={value}" for step, value in zip(labelled, shown, strict=True))
    return {
        "prompt": f"Start with {start}:{''.join(labelled)}. What is the result?",
        "answer": answer,
        "demonstration": f"={start}{worked}\n{_boxed(shown[-1])}",
        "num_steps": len(names),
        "tier": tier,
        "is_wrong": wrong is not None,
    }


def make_rows(
    config: TiersConfig, num_eval: int, seed: int
) -> tuple[list[TiersRow], list[TiersRow]]:
    """`config.num_train` training rows and `num_eval` held-out rows, all with different prompts.

    Held out are all tiers in equal parts, one after the other. Of the training rows, in random
    order, a `skill_fraction` is of that tier and the others are easy, medium and hard in equal
    parts; exactly round(wrong_fraction * num_train) have a wrong demonstration.

    Raises:
        ConfigError: there are too few problems of a tier.
    """
    rng = random.Random(f"tiers rows {seed}")
    num_skill = round(config.skill_fraction * config.num_train)
    num_of_tier = _parts(config.num_train - num_skill, _WITHOUT_SKILL) | {SKILL_TIER: num_skill}
    taken: set[_Draft] = set()

    def draw(tier: str, count: int) -> list[_Draft]:
        found: dict[_Draft, None] = {}
        for _ in range(_ATTEMPTS * count):
            if len(found) == count:
                break
            draft = _draw(rng, config, tier)
            if draft not in taken:
                found[draft] = None
        if len(found) < count:
            raise ConfigError(
                f"tiers.num_train: expected at most {len(found)} different problems of the tier "
                f"{tier} beside those held out, got {count}"
            )
        taken.update(found)
        return list(found)

    held_out = [
        each for tier, count in _parts(num_eval, TIERS).items() for each in draw(tier, count)
    ]
    train = [each for tier, count in num_of_tier.items() for each in draw(tier, count)]
    rng.shuffle(train)
    wrong = set(rng.sample(range(len(train)), round(config.wrong_fraction * len(train))))
    return [
        make_row(*draft, wrong=_mistake(rng, draft) if place in wrong else None)
        for place, draft in enumerate(train)
    ], [make_row(*draft) for draft in held_out]


def make_lessons(
    config: TiersConfig, num_lessons: int, seed: int, exclude: Collection[str] = ()
) -> list[tuple[str, str]]:
    """What the base learns from: (prompt, completion) of problems with 1 to hard_steps operations.

    None has the operation `flip`.

    Args:
        exclude: prompts, such as the held-out ones, whose problems no lesson uses.
    """
    rng = random.Random(f"tiers lessons {seed}")
    excluded = frozenset(exclude)
    lessons: list[tuple[str, str]] = []
    while len(lessons) < num_lessons:
        names = rng.choices(list(_KNOWN), k=rng.randint(1, config.hard_steps))
        row = make_row(_start(rng), names, "lesson")
        if row["prompt"] not in excluded:
            lessons.append(_lesson(rng, config, row))
    return lessons


def _lesson(rng: random.Random, config: TiersConfig, row: TiersRow) -> tuple[str, str]:
    if rng.random() < config.asked_fraction:
        return row["prompt"] + _ASKED, row["demonstration"]
    if row["num_steps"] <= config.easy_steps:
        worked_fraction = config.easy_worked_fraction
    elif row["num_steps"] <= config.medium_steps:
        worked_fraction = config.medium_worked_fraction
    else:
        worked_fraction = 0.0
    is_worked = rng.random() < worked_fraction
    return row["prompt"], row["demonstration"] if is_worked else _boxed(row["answer"])


def _draw(rng: random.Random, config: TiersConfig, tier: str) -> _Draft:
    shortest, longest = {
        "easy": (2, config.easy_steps),
        "medium": (config.easy_steps + 1, config.medium_steps),
        "hard": (config.medium_steps + 1, config.hard_steps),
        "skill": (max(_NUM_FLIPS), config.medium_steps),
        "beyond": (config.hard_steps + 1, config.beyond_steps),
    }[tier]
    has_skill = tier == SKILL_TIER or (tier == "beyond" and rng.random() < 0.5)
    while True:
        start = _start(rng)
        names = rng.choices(list(_KNOWN), k=rng.randint(shortest, longest))
        if has_skill:
            for place in rng.sample(range(len(names)), rng.choice(_NUM_FLIPS)):
                names[place] = SKILL
        if not has_skill or _needs_skill(start, names):
            return _Draft(start, tuple(names), tier)


def _needs_skill(start: str, names: Sequence[str]) -> bool:
    """Whether all who take `flip` for nothing, or for another operation, get a wrong answer."""
    answer = _results(start, names)[-1]
    mistaken = [[name for name in names if name != SKILL]]
    mistaken += [[other if name == SKILL else name for name in names] for other in _KNOWN]
    return all([start, *_results(start, others)][-1] != answer for others in mistaken)


def _mistake(rng: random.Random, draft: _Draft) -> tuple[int, str]:
    """An operation and a result that it does not have, with one wrong die."""
    step, place = rng.randrange(len(draft.names)), rng.randrange(_NUM_DICE)
    right = _results(draft.start, draft.names)[step]
    face = rng.choice(_FACES.replace(right[place], ""))
    return step, right[:place] + face + right[place + 1 :]


def _start(rng: random.Random) -> str:
    return "".join(rng.choices(_FACES, k=_NUM_DICE))


def _results(start: str, names: Sequence[str]) -> list[str]:
    """The result of each operation."""
    values = [start]
    for name in names:
        values.append(_OPERATIONS[name](values[-1]))
    return values[1:]


def _labels(start: str, names: Sequence[str]) -> str:
    """Consecutive letters from any on, so that the longest chains need no letter of their own.

    They follow from the problem, so that no problem has two prompts.
    """
    letters = string.ascii_lowercase
    first = random.Random(f"{start} {' '.join(names)}").randrange(len(letters) - len(names) + 1)
    return letters[first : first + len(names)]


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _parts(total: int, tiers: Sequence[str]) -> dict[str, int]:
    """`total` in equal parts; the first ones have one more where that is not possible."""
    share, rest = divmod(total, len(tiers))
    return {tier: share + (place < rest) for place, tier in enumerate(tiers)}
