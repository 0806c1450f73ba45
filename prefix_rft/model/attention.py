"""The `sdpa` attention of transformers without two of its costs.

- Packed rows: transformers separates them with a [T, T] mask, so work grows with the square of all
  tokens. Here rows are padded to the longest one, inside the attention only.
- Masked decoding with grouped heads: transformers repeats the whole cache for every query head.
  Here the query heads of a group become queries of one head.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefix_rft.checks import ConfigError

LEAN_SDPA = "lean_sdpa"  # for `model.set_attn_implementation`


def check_micro_batches(model: PreTrainedModel, micro_batch_tokens: int) -> None:
    """Refuse micro-batches that are longer than the causal mask which some models keep.

    Raises:
        ConfigError: `model` is such a one, and cannot take so many tokens in one forward.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    has_mask = any(buffer.shape[-2:] == (limit, limit) for buffer in model.buffers())
    if has_mask and micro_batch_tokens > limit:
        raise ConfigError(
            f"trainer.micro_batch_tokens: expected at most {limit}, the size of the causal mask "
            f"that {type(model).__name__} keeps, got {micro_batch_tokens}"
        )


def lean_sdpa_forward(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, d] with cu_seq_lens_q, otherwise [B, H, L, d]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,  # [B + 1] int32, bounds of the packed rows
    max_length_q: int | None = None,  # longest packed row, on the host
    sliding_window: int | None = None,  # tokens a query attends to, itself included
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T) v within each row; without `cu_seq_lens_q`, the `sdpa` of transformers.

    Returns:
        [1, T, H, d] (or [B, L, H, d]), and None for the attention weights.
    """
    if cu_seq_lens_q is None:
        if query.shape[2] == 1 and query.shape[1] > key.shape[1]:
            return _decode_grouped(query, key, value, attention_mask, kwargs["scaling"]), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert max_length_q is not None
    num_rows, num_tokens, device = len(cu_seq_lens_q) - 1, query.shape[2], query.device
    tokens = torch.arange(num_tokens, device=device, dtype=cu_seq_lens_q.dtype)
    row = torch.searchsorted(cu_seq_lens_q[1:], tokens, right=True)
    place = row * max_length_q + (tokens - cu_seq_lens_q[row])  # [T] index in the padded layout

    def pad(packed: torch.Tensor) -> torch.Tensor:  # [1, H, T, d] -> [B, H, L, d]
        flat = packed[0].transpose(0, 1)
        padded = flat.new_zeros(num_rows * max_length_q, *flat.shape[1:])
        padded = padded.index_copy(0, place, flat)
        return padded.unflatten(0, (num_rows, max_length_q)).transpose(1, 2)

    window_mask = None  # plain causal
    if sliding_window is not None and sliding_window < max_length_q:
        positions = torch.arange(max_length_q, device=device)
        distance = positions[:, None] - positions[None]
        window_mask = (distance >= 0) & (distance < sliding_window)
    output, _ = sdpa_attention_forward(
        module, pad(query), pad(key), pad(value), window_mask, **kwargs
    )
    return output.flatten(0, 1)[place][None], None


def _decode_grouped(
    query: torch.Tensor,  # [B, H, 1, d]
    key: torch.Tensor,  # [B, H / groups, L, d]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # [B, 1, 1, L] bool
    scaling: float,
) -> torch.Tensor:  # [B, 1, H, d]
    grouped = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.flatten(1, 2)[:, None]


AttentionInterface.register(LEAN_SDPA, lean_sdpa_forward)
AttentionMaskInterface.register(LEAN_SDPA, sdpa_mask)
