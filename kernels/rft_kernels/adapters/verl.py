"""verl's log-prob and entropy functions, with the signatures of verl 0.9.1: from logits and hidden.

Results are float32 whatever the logits (float64 for float64).
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _check
from ..rows import sum_squared_probs, token_stats
from ._linear import head_stats
from ._patch import Patch, install, refusing


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, [...], nats.

    Args:
        logits: [..., V].
        labels: as many as rows, in any shape (verl passes [1, T] with logits [T, V]); -100 gives 0.
        inplace_backward: the backward writes the gradient over `logits`; whatever else needs their
            values then (an entropy with a gradient) raises, so pass False there, as verl does.
    Raises:
        TypeError, ValueError: as `token_stats`.
    Differentiable once in `logits`.
    """
    rows = logits.shape[:-1]
    labels = labels.reshape(rows if labels.numel() == rows.numel() else -1)
    return token_stats(logits, labels, inplace_backward=inplace_backward).log_probs


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """`logprobs_from_logits` that leaves the logits as they are."""
    return logprobs_from_logits(logits, labels, inplace_backward=False)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Sum of the squares of softmax(logits), [...]; differentiable once. Reads the logits once.

    Raises:
        TypeError, ValueError: as `token_stats`.
    """
    return sum_squared_probs(logits)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), [...], nats; differentiable once."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, labels).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of softmax(logits), [...], nats; differentiable. `chunk_size` is not needed here."""
    return entropy_from_logits(logits)


class _Partial(torch.autograd.Function):
    """Its input, whose gradient is the whole on every rank, and here made a part of the sum."""

    @staticmethod
    def forward(ctx, hidden: Tensor, num_ranks: int) -> Tensor:
        ctx.num_ranks = num_ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, dhidden: Tensor) -> tuple[Tensor, None]:
        return dhidden / ctx.num_ranks, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy, from hidden states.

    Args:
        hidden: [..., D], T rows in all; under autocast the product is in its dtype.
        weight: [V, D]; with `dist_process_group` this rank's classes, ranks in order.
        labels: T integers of any shape, counted over the classes of all ranks; -100 gives 0.
        temperature: above 0.
        reduction: of the log-probabilities: "none", "sum" or "mean" over all T.
        dist_process_group: the ranks that share the classes; all else is the same on each. The
            gradients by `hidden` then add up over ranks, and the caller reduces them, as verl does.
    Returns:
        (log_probs [T], or 0-dim if reduced; entropy [T]), nats.
    Raises:
        TypeError, ValueError: as `linear_token_stats`, or `reduction` is unknown.
    Both are differentiable once in `hidden` and `weight`. The logits never exist whole.
    """
    reduction = reduction.lower()
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None:
        hidden = _Partial.apply(hidden, dist_process_group.size())
    log_probs, entropy = head_stats(
        hidden,
        weight,
        labels.flatten(),
        temperature=temperature,
        process_group=dist_process_group,
    )
    return log_probs if reduction == "none" else getattr(log_probs, reduction)(), entropy


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of that name, whose backends "torch" and "liger" are both served by ours."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        _check.one_of("impl_backend", impl_backend, ("torch", "liger"))

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), the shape of `input_ids`, of hidden_states [..., D]; in nats."""
        return head_stats(hidden_states, vocab_weights, input_ids, temperature=temperature)


def patch() -> Patch:
    """Serves verl from here, until the handle it returns is undone.

    An actor compiles the entropy when it is built: patch before that.

    Raises:
        ImportError: verl, or a name expected in it, is missing.
    """
    module = "verl.utils.torch_functional"
    return install(
        "verl",
        {
            f"{module}:logprobs_from_logits": logprobs_from_logits,
            f"{module}:logprobs_from_logits_v2": logprobs_from_logits_v2,
            f"{module}:calculate_sum_pi_squared_from_logits": calculate_sum_pi_squared_from_logits,
            f"{module}:entropy_from_logits": entropy_from_logits,
            f"{module}:entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy": linear_cross_entropy,
            "verl.utils.experimental.torch_functional:FusedLinearForPPO": FusedLinearForPPO,
        },
    )


_SHARDED = "its logits are shards of rows; `linear_cross_entropy(dist_process_group=)` makes none"
__getattr__ = refusing(
    __name__,
    {"vocab_parallel_entropy": _SHARDED, "vocab_parallel_log_probs_from_logits": _SHARDED},
)
