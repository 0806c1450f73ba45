"""The reference of the configuration; `python -m prefix_rft.config.reference` prints it."""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from typing import get_type_hints

from prefix_rft.checks import describe
from prefix_rft.config.config import Config

HEAD = """\
# Configuration

A run is configured by a TOML file with the sections below, or by the name of one that ships in
`prefix_rft/configs`. A key that is left out keeps its default. On the command line every key is an
option that follows the configuration:

    prefix-rft train testbed --trainer.num-steps 20 --rollout.max-log-prob-gap None

Where none is allowed, the file leaves the key out and the command line says `None`.

<!-- python -m prefix_rft.config.reference > docs/configuration.md -->
"""


def reference() -> str:
    """The page: a table for each section; meanings are the comments in the source."""
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    sections = {name: type_ for name, type_ in types.items() if dataclasses.is_dataclass(type_)}
    parts = [HEAD, *_table(Config, [name for name in types if name not in sections])]
    for name, section in sections.items():
        parts += [f"\n## [{name}]\n", f"{inspect.getdoc(section)}\n"]
        parts += _table(section, [field.name for field in dataclasses.fields(section)])
    return "\n".join(parts) + "\n"


def field_comments(section: type) -> dict[str, str]:
    """The comment beside each field, else that above it; also of inherited fields."""
    comments = {}
    for cls in reversed(section.__mro__[:-1]):
        above: list[str] = []
        for line in inspect.getsource(cls).splitlines():
            if field := re.match(r"    (\w+): ", line):
                comments[field[1]] = line.partition("  # ")[2] or " ".join(above)
            above = [*above, line.strip(" #")] if line.startswith("    # ") else []
    return comments


def _table(section: type, names: list[str]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    annotations, comments = get_type_hints(section, include_extras=True), field_comments(section)
    defaults = section()
    for name in names:
        default = getattr(defaults, name)
        cells = (
            f"`{name}`",
            describe(annotations[name]),
            "none" if default is None else f"`{json.dumps(default)}`",
            comments[name],
        )
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    print(reference(), end="")
