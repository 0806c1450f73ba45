"""The configuration's reference page says what the code says."""

import dataclasses
from pathlib import Path

from prefix_rft.config import Config
from prefix_rft.config.reference import field_comments, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


class Base:
    # above
    # it
    first: int = 1
    second: str = "#"  # beside: a "#"


class Derived(Base):
    third: int = 3
    fourth: int = 4  # its own


def test_the_page_is_current() -> None:
    message = "run python -m prefix_rft.config.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == reference(), message


def test_every_field_says_what_it_means() -> None:
    sections = [f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]
    for section in sections:
        assert not section.__doc__.startswith(f"{section.__name__}(")  # the one dataclasses make
        comments = field_comments(section)
        assert [f.name for f in dataclasses.fields(section) if not comments[f.name]] == []


def test_inherited_fields_and_comments_above_or_beside_are_found() -> None:
    assert field_comments(Derived) == {
        "first": "above it",
        "second": 'beside: a "#"',
        "third": "",
        "fourth": "its own",
    }
