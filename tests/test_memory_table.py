"""The search for the longest response that fits, against every length tried."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.memory_table import HEADS, MOST, UNIT, longest, markdown

MODELS = {
    "a line": lambda tokens: 3000 + 0.9 * tokens,
    "steep, then flat": lambda tokens: 3000 + 1.2 * min(tokens, 1700) + 0.1 * tokens,
    "flat, then steep": lambda tokens: 3000 + 0.1 * tokens + max(0, tokens - 5000),
}


def search(peak: object, limit: float, known: list | None = None) -> tuple[int, list[int]]:
    """What is found where a length fits up to the limit; and the lengths tried."""
    tried: list[int] = []

    def trial(length: int) -> float | None:
        tried.append(length)
        return peak(length) if peak(length) <= limit else None

    return longest(trial, limit=limit, known=[] if known is None else known), tried


def check(found: int, peak: object, limit: float) -> None:
    """It fits, and what is a step and a sixteenth longer does not."""
    assert found % UNIT == 0 and 0 <= found <= MOST
    assert found == 0 or peak(found) <= limit
    assert found == MOST or peak(max(found + UNIT, found * 17 / 16)) > limit


@pytest.mark.parametrize("name", MODELS)
@given(limit=st.floats(1000, 90_000))
@settings(derandomize=True, deadline=None)
def test_the_longest_that_fits(name, limit):
    found, tried = search(MODELS[name], limit)
    check(found, MODELS[name], limit)
    assert len(tried) == len(set(tried)) <= 12


def test_trials_are_few_where_memory_is_linear():
    found, tried = search(MODELS["a line"], 40_000)
    assert len(tried) <= 4 and found > 0.93 * 37_000 / 0.9


def test_nothing_fits():
    assert search(MODELS["a line"], 100) == (0, [UNIT])


def test_the_end_is_a_lower_bound():
    found, tried = search(MODELS["a line"], 10**6)
    assert (found, tried[-1]) == (MOST, MOST)


def test_a_larger_limit_begins_where_the_smaller_ended():
    known: list = []
    small, _ = search(MODELS["a line"], 16_000, known)
    large, tried = search(MODELS["a line"], 32_000, known)
    check(large, MODELS["a line"], 32_000)
    assert min(tried) > small and len(tried) <= 2


def test_a_prediction_that_is_too_long_is_not_insisted_on():
    """Part of the limit is lost to fragments: what is predicted never fits."""
    found, tried = search(lambda tokens: 3000 + 0.9 * tokens * (tokens < 21_000 or 99), 40_000)
    assert 0.93 * 21_000 < found < 21_000 and len(tried) <= 8


def test_markdown():
    rows = [
        {"model": "m", "training": "all", "limit_gib": limit, "variant": head, "longest_tokens": n}
        for limit, pair in ((16, (5120, 0)), (24, (MOST, 2048)))
        for head, n in zip(HEADS, pair, strict=True)
    ][:-1]
    assert markdown(rows).splitlines() == [
        "| model | trained | 16 GiB | 24 GiB |",
        "|---|---|---|---|",
        f"| m | all | none → 5,120 | ? → {MOST:,}+ |",
    ]
