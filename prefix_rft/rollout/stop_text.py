"""Texts that end a completion, in every engine alike."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from prefix_rft.data_types import Completion

_MARGIN = 8  # tokens, for those that decode to nothing or to a part of a character


class StopText:
    """Ends a completion with the token that completes one of `texts` in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        self._reach = max(len(text.encode()) for text in texts) + _MARGIN

    def is_in_last(self, num_new: int, token_ids: Sequence[int]) -> bool:
        """Whether one of the texts was completed within the last `num_new` tokens."""
        return self._is_in(token_ids[-(num_new + self._reach) :]) and self._is_in(token_ids)

    def cut(self, completion: Completion) -> Completion:
        """`completion` up to the first of the texts."""
        ids = completion.token_ids
        if not self._is_in(ids):
            return completion
        end = bisect_left(range(len(ids) + 1), True, key=lambda count: self._is_in(ids[:count]))
        return replace(
            completion,
            token_ids=ids[:end],
            log_probs=completion.log_probs[:end],
            finish_reason="stop",
        )

    def _is_in(self, token_ids: Sequence[int]) -> bool:
        text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._texts)
