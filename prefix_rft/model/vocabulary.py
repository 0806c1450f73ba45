"""Which token ids a model can use, and which of them end a response."""

from collections.abc import Sequence

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

_ANSWER = "answer42"  # stands for any response; no template changes it


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of `tokenizer` + 1; more than its number of tokens if it has holes."""
    return max(tokenizer.get_vocab().values()) + 1


def end_of_response_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response: what the chat template writes behind the assistant's turn.

    The end-of-sequence token, if the template writes no added token there.
    """
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:  # it wants other turns
        return tokenizer.eos_token_id
    end = text.rpartition(_ANSWER)[2].lstrip()
    tokens = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    found = [token for token in tokens if _ANSWER in text and end.startswith(token)]
    return tokens[max(found, key=len)] if found else tokenizer.eos_token_id


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    extra: Sequence[int] = (),
) -> tuple[int, ...]:
    """All ids that end a completion.

    They are the ends of a response and of a sequence, those of the generation config, and `extra`.
    """
    found = generation_config.eos_token_id if generation_config else None
    listed = found if isinstance(found, list) else [] if found is None else [found]
    ends = {end_of_response_id(tokenizer), tokenizer.eos_token_id}
    return tuple(sorted({*ends, *listed, *extra}))
