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
    ids = [*prefix_ids, *response_ids(tokenizer, completion)]
    return tokenizer.decode([token for token in ids if token not in hidden])


def response_ids(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> tuple[int, ...]:
    """The tokens of a completion but for the end of its turn, special or not."""
    ids = completion.token_ids
    if not ids or completion.finish_reason != "stop":
        return ids
    is_end = ids[-1] in tokenizer.added_tokens_decoder or ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if is_end else ids
