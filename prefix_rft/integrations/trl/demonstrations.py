"""Rows of a dataset of TRL's to the token ids of their demonstrations."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from prefix_rft.checks import ConfigError
from prefix_rft.data import demonstration_text, tokenize_demonstrations
from prefix_rft.methods import PrefixRFTConfig, cut_prefix

_BATCH = 256  # rows


class Demonstrations:
    """Reads the demonstrations of one dataset.

    Args:
        column: of the demonstrations: text, or messages, of which the last of the assistant counts.
        template: how prompts of messages are rendered: arguments of `apply_chat_template`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, column: str, template: Mapping[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.template = dict(template)

    def ids(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
        """The ids that each demonstration has behind its prompt; () of a row without one.

        Raises:
            ConfigError: the rows do not have the column.
        """
        if rows and self.column not in rows[0]:
            raise ConfigError(
                f"demonstration_column: expected a column of the rows, which have "
                f"{sorted(rows[0])}, got {self.column!r}"
            )
        texts = [demonstration_text(row[self.column]) for row in rows]
        return tokenize_demonstrations([self._rendered(row) for row in rows], texts, self.tokenizer)

    def check(self, dataset: Dataset, config: PrefixRFTConfig, max_response_length: int) -> None:
        """Refuse a dataset of whose demonstrations some do not fit, or that has none at all.

        Raises:
            ConfigError: says how many do not fit, and where the first is.
        """
        misfits: list[tuple[int, str]] = []
        num_found = 0
        for start in range(0, len(dataset), _BATCH):
            rows = dataset.select(range(start, min(start + _BATCH, len(dataset))))
            for i, ids in enumerate(self.ids(list(rows))):
                num_found += bool(ids)
                try:
                    if ids:
                        cut_prefix(
                            ids,
                            config.high,
                            min_tokens=config.min_prefix_tokens,
                            max_response_length=max_response_length,
                        )
                except ValueError as error:
                    misfits.append((start + i, str(error)))
        if not num_found:
            raise ConfigError(
                f"demonstration_column: expected text, or messages of an assistant, in "
                f"{self.column!r}, which has none in {len(dataset)} rows"
            )
        if misfits:
            row, text = misfits[0]
            text = text.replace("max_response_length", "max_completion_length")
            raise ConfigError(
                f"train_dataset: {len(misfits)} of {num_found} demonstrations do not fit, such as "
                f"that of row {row}: {text}; leave them out, or raise max_completion_length"
            )

    def _rendered(self, row: Mapping[str, Any]) -> str:
        prompt = row["prompt"]
        if not is_conversational({"prompt": prompt}):
            return prompt
        return self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False, **self.template
        )
