"""Prompts by name: how a benchmark's problem is put to the model.

A file of `prompts/` is a system prompt for the tokenizer's chat template, or, where it contains
`{{problem}}`, the whole text that the model continues.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefix_rft.checks import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"  # the tokenizer's chat template alone
_FOLDER = Path(__file__).with_name("prompts")
_PLACE = "{{problem}}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What stands around a problem."""

    name: str
    system: str | None = None
    whole: tuple[str, str] | None = None  # the text before and after the problem

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """`tokenizer`, or one whose chat template is the whole text."""
        if self.whole is None:
            return tokenizer
        before, after = (text.replace("'", "\\'").replace("\n", "\\n") for text in self.whole)
        raw = copy.copy(tokenizer)
        raw.chat_template = f"{{{{ '{before}' + messages[-1]['content'] + '{after}' }}}}"
        return raw


def prompt_names() -> list[str]:
    return [NONE, *sorted(path.stem for path in _FOLDER.glob("*.txt"))]


def find_prompt(name: str) -> Prompt:
    """The prompt of that name.

    Raises:
        ConfigError: there is none.
    """
    if name == NONE:
        return Prompt(name=name)
    if name not in prompt_names():
        raise ConfigError(f"--prompt: expected one of {', '.join(prompt_names())}, got {name!r}")
    text = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
    before, is_whole, after = text.partition(_PLACE)
    if is_whole:
        return Prompt(name=name, whole=(before, after))
    return Prompt(name=name, system=text)
