"""Shared fixtures: a tiny random model and a tokenizer of one token a character."""

import os
import string
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # heeded only before triton, and so transformers, is there

from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII, one token a character; ids 0 and 1 are <pad> and <eos>."""
    tokens = ["<pad>", "<eos>", "<unk>", *string.printable[:96], "\n"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """A tiny causal language model with random weights far from flat, by its `model_type`."""

    def make(
        model_type: str = "qwen2",
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        **overrides: object,
    ) -> PreTrainedModel:
        options = {
            "vocab_size": 112,  # the lm_head is padded past the tokenizer
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        config = AutoConfig.for_model(model_type, **(options | overrides))
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Qwen2 in float32; its lm_head has more columns than `tiny_tokenizer` has tokens."""
    return make_model()
