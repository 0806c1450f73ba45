"""What a run keeps in the memory of its device, estimated from shapes; no weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from prefix_rft.config import Config, ConfigError
from prefix_rft.loading import resolve_autocast_dtype

WORKSPACE_BYTES = 2**30  # what the vocabulary-sized ops of rft_kernels allow themselves


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes that the memory of a run follows from."""

    num_parameters: int
    layers: int
    hidden: int
    query: int  # heads x head size
    key: int  # key-value heads x head size
    ffn: int
    vocabulary: int
    tokens: int  # of the largest micro-batch
    sequences: int  # generated at once
    length: int  # tokens of the longest sequence, prompt included
    weight_bytes: int
    compute_bytes: int  # of an activation; below weight_bytes under autocast


@dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """One thing that takes memory, and when."""

    name: str
    num_bytes: int
    formula: str
    phase: Literal["always", "update", "rollout", "avoided"]  # avoided: told for comparison


def shapes_of(config: Config) -> Shapes:
    """The shapes of a run of `config`.

    Raises:
        ConfigError: the model's configuration cannot be read, or a device that is not there.
    """
    model_config = _model_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    weight_bytes = 8 if config.model.dtype == "float64" else 4
    length = config.data.max_prompt_tokens + config.rollout.max_response_length
    return Shapes(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_size,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        ffn=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        tokens=max(config.trainer.micro_batch_tokens, length),
        sequences=min(
            config.rollout.max_batch_sequences,
            config.trainer.prompts_per_step * config.rollout.group_size,
        ),
        length=length,
        weight_bytes=weight_bytes,
        compute_bytes=2 if resolve_autocast_dtype(config.model) else weight_bytes,
    )


def memory_terms(s: Shapes, *, gradient_checkpointing: bool) -> list[MemoryTerm]:
    """Every term with its formula; activations are what autograd saves in a Qwen2-like layer."""
    w, a = s.weight_bytes, s.compute_bytes
    is_cast = a < w
    # The two norms save input, normalised input and output each; attention saves query, key, value
    # and output; the feed-forward saves gate, activated gate, up and product.
    norms = 6 * w + a * is_cast
    layer_token = norms * s.hidden + 2 * a * (s.query + s.key) + 4 * a * s.ffn
    layer_formula = f"({norms} hidden + {2 * a} (query + key) + {4 * a} ffn)"
    sizes = f"hidden {s.hidden:,}, query {s.query:,}, key {s.key:,}, ffn {s.ffn:,}"
    layers_tokens = f"{s.layers} layers x {s.tokens:,} tokens"
    eager = s.tokens * s.vocabulary * (a + 3 * 4)

    def term(name: str, num_bytes: int, formula: str, phase: str) -> MemoryTerm:
        if phase == "avoided":
            name, formula = f"({name})", f"{formula}; for comparison"
        return MemoryTerm(name=name, num_bytes=num_bytes, formula=formula, phase=phase)

    def parameters(name: str, num_bytes: int, phase: str) -> MemoryTerm:
        formula = f"{s.num_parameters:,} parameters x {num_bytes} bytes"
        return term(name, s.num_parameters * num_bytes, formula, phase)

    return [
        parameters("weights", w, "always"),
        parameters("AdamW state", 2 * w, "always"),
        parameters("gradients", w, "update"),
        *([parameters("weights, cast for the forward", a, "update")] if is_cast else []),
        term(
            "activations",
            s.layers * s.tokens * layer_token,
            f"{layers_tokens} x {layer_formula} bytes; {sizes}",
            "avoided" if gradient_checkpointing else "update",
        ),
        term(
            "activations, checkpointed",
            s.layers * s.tokens * w * s.hidden + s.tokens * layer_token,
            f"{layers_tokens} x {w} hidden bytes, and one layer in full",
            "update" if gradient_checkpointing else "avoided",
        ),
        term(
            "logits, eager",
            eager,
            f"{s.tokens:,} tokens x {s.vocabulary:,} x ({a} + 3 x 4) bytes: logits, and in float32 "
            "logits, log-softmax, gradient",
            "avoided",
        ),
        term("logits, rft_kernels", min(WORKSPACE_BYTES, eager), "workspace at most", "update"),
        term(
            "KV cache",
            s.sequences * s.length * s.layers * 2 * s.key * a,
            f"{s.sequences:,} sequences x {s.length:,} tokens x {s.layers} layers x 2 key x {a} "
            "bytes, where all get that long",
            "rollout",
        ),
    ]


def peak_bytes(terms: Sequence[MemoryTerm]) -> int:
    """What always stays and the larger of update and rollout, which take turns."""

    def of(phase: str) -> int:
        return sum(term.num_bytes for term in terms if term.phase == phase)

    return of("always") + max(of("update"), of("rollout"))


def _model_config(config: Config) -> PreTrainedConfig:
    path, base = config.model.path, config.base
    if path is None:
        return Qwen2Config(
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            num_hidden_layers=base.num_layers,
            num_attention_heads=base.num_heads,
            num_key_value_heads=base.num_heads,
            intermediate_size=base.intermediate_size,
            tie_word_embeddings=True,
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path: expected a model folder or a hub id that can be reached, got {path!r} "
            f"({reason})"
        ) from error
