"""The text of a response, as the grader and rewards see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefix_rft.data_types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def response_text(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, prefix_ids: Sequence[int] = ()
) -> str:
    """Prefix and completion as text, without padding and what begins or ends a sequence.

    Other special tokens stay: a `</think>` that is one tells thought from answer.
    """
    hidden = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    ids = [*prefix_ids, *completion.token_ids]
    if completion.token_ids and completion.finish_reason == "stop":
        last = tokenizer.added_tokens_decoder.get(ids[-1])
        if last is not None:  # the end of a turn, special or not
            ids.pop()
    return tokenizer.decode([token for token in ids if token not in hidden])
