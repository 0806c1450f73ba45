"""A model's weights as in its Hugging Face folder, although it may be sharded or have adapters."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from prefix_rft.model.distributed import full_tensor
from prefix_rft.model.lora import adapted_weights, is_adapter, merged_name, merged_weight


def full_weights(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    bucket_bytes: int,
    vocab_size: int | None = None,
    unties: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and full weights of `model` in `dtype`, with its adapters merged. Collective.

    Adapters are merged into the shards, which are then cast and gathered, as many at a time as fit
    into `bucket_bytes`, or a single larger one. Every rank gathers a whole bucket before it yields
    the first weight. A yielded tensor may be the model's own and must not be modified.

    Args:
        model: a causal language model of transformers.
        vocab_size: rows of embedding and lm_head to keep; None: all.
        unties: yield a tied weight under each of its names instead of only the first.
    """
    weights = _named_weights(model, unties)
    layers, by_token = adapted_weights(model), _by_token(model)

    @torch.no_grad()
    def full(weight: torch.Tensor) -> torch.Tensor:
        layer = layers.get(id(weight))
        local = weight.detach() if layer is None else merged_weight(layer)
        whole = full_tensor(local.to(dtype) if local.is_floating_point() else local)
        return whole[:vocab_size] if id(weight) in by_token else whole

    for bucket in _buckets(weights, dtype, bucket_bytes):
        gathered = [(name, full(weight)) for name, weight in bucket]
        while gathered:
            yield gathered.pop(0)


def weight_shapes(
    model: nn.Module, *, dtype: torch.dtype, vocab_size: int | None = None, unties: bool = False
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of what `full_weights` yields, in its order. Gathers nothing."""
    by_token = _by_token(model)
    shapes = []
    for name, weight in _named_weights(model, unties):
        shape = tuple(weight.shape)
        if id(weight) in by_token and vocab_size is not None:
            shape = (min(shape[0], vocab_size), *shape[1:])
        shapes.append((name, dtype if weight.is_floating_point() else weight.dtype, shape))
    return shapes


def _named_weights(model: nn.Module, unties: bool) -> list[tuple[str, torch.Tensor]]:
    weights: dict[int | str, tuple[str, torch.Tensor]] = {}
    # state_dict() first: it reshards what a forward left gathered.
    for name, weight in model.state_dict(keep_vars=True).items():
        if not is_adapter(name):
            weights.setdefault(name if unties else id(weight), (merged_name(name), weight))
    return list(weights.values())


def _by_token(model: nn.Module) -> set[int]:
    """Ids of the parameters that have one row per token of the vocabulary."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {id(embedding.weight), id(head.weight), id(getattr(head, "bias", None))}


def _buckets(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    bucket, size = [], 0
    for name, weight in weights:
        num_bytes = weight.numel() * dtype.itemsize
        if bucket and size + num_bytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, weight))
        size += num_bytes
    yield bucket
