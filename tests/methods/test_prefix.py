"""Prefix schedules and the cut (SPEC: window decays 95% -> 5%, L = floor(l * len) clamped)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_rft.methods.prefix import PrefixOptions, cut_prefix

SCHEDULES = ("cosine_window", "cosine", "linear_window", "uniform", "constant")


@pytest.mark.parametrize(
    ("step", "mean"), [(0, 0.95), (25, 0.884), (50, 0.725), (75, 0.566), (100, 0.5), (500, 0.5)]
)
def test_cosine_window_has_the_published_means(step: int, mean: float) -> None:
    low, high = PrefixOptions().window(step, num_steps=100)
    assert high == 0.95
    assert (low + high) / 2 == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [
        ("cosine_window", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
        ("cosine", (0.95, 0.95), (0.5, 0.5), (0.05, 0.05)),
        ("linear_window", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
        ("uniform", (0.05, 0.95), (0.05, 0.95), (0.05, 0.95)),
        ("constant", (0.95, 0.95), (0.95, 0.95), (0.95, 0.95)),
    ],
)
def test_every_schedule_at_its_ends_and_middle(schedule, start, middle, end) -> None:
    options = PrefixOptions(schedule=schedule)
    windows = [options.window(step, num_steps=10) for step in (0, 5, 10)]
    assert windows == [pytest.approx(window) for window in (start, middle, end)]


def test_linear_and_cosine_differ_between_the_ends() -> None:
    cosine, linear = (
        PrefixOptions(schedule=schedule).window(1, num_steps=4)[0]
        for schedule in ("cosine_window", "linear_window")
    )
    assert linear == pytest.approx(0.725)
    assert cosine == pytest.approx(0.8182, abs=1e-4)


@given(st.integers(2, 400), st.floats(0, 1), st.integers(1, 5))
def test_cut_is_a_proper_prefix_of_floor_length(length: int, ratio: float, least: int) -> None:
    demonstration = tuple(range(length))
    prefix = cut_prefix(demonstration, ratio, min_tokens=least, max_response_length=1000)
    assert prefix == demonstration[: len(prefix)]
    assert 1 <= len(prefix) < length
    if least <= int(ratio * length) < length:
        assert len(prefix) == int(ratio * length)


def test_demonstration_of_one_token_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens to cut, got 1"):
        cut_prefix([7], 0.5, min_tokens=1, max_response_length=10)


def test_prefix_must_leave_room_for_a_continuation() -> None:
    with pytest.raises(ValueError, match="fewer than max_response_length = 5 tokens, got 9"):
        cut_prefix(range(10), 0.95, min_tokens=1, max_response_length=5)
