"""Hidden states to statistics: the logits exist a tile of rows at a time (E9).

T rows, V classes, D hidden size. GEMM work: 2 T V D flops, and three times as much in the backward.
Vocabulary-sized temporaries: `workspace_bytes`.
"""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ..results import LseStats, TokenStats
from .inputs import check_inputs, served_by
from .tiles import Rows


def linear_token_stats(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of hidden @ lm_head_weight.T, which never exists whole.

        logits = hidden @ lm_head_weight.T + inner @ up.T + bias
        softcap c: logits = c tanh(logits / c)

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        lm_head_weight: [V, D] of the same dtype.
        targets: [...] int64 or int32, already shifted; -100 = no target.
        bias: [V] of the same dtype.
        low_rank: the pair inner [..., R], up [V, R] of the same dtype, as a LoRA adapter of the
            head brings it; neither a second [V, D] matrix nor its gradient is formed.
        softcap: above 0, in units of the logits, before the temperature.
        workspace_bytes: bound of the vocabulary-sized temporaries, in bytes; five rows of logits at
            least. No more is used than makes it faster.
        temperature, row_mask, vocab_size, backend: see `token_stats`; columns from `vocab_size` on
            are not even projected.
        process_group: `lm_head_weight`, and what comes by classes beside it, are this rank's part
            of them, in the order of the group's ranks; all else is the same on all ranks, and so
            are the results. `vocab_size` counts the classes of all. A weight that is a DTensor
            placed Shard(0) says as much by itself. Not under torch.compile.
    Returns:
        TokenStats of shape [...]; rows without a target are 0.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    Both outputs are differentiable once in `hidden`, `lm_head_weight`, `bias` and `low_rank`; the
    backward projects again, and only (on a CPU) rows whose incoming gradients are not both zero.
    Sums are float32 (float64 for float64). Deterministic.
    """
    return TokenStats(
        *_stats(
            hidden,
            lm_head_weight,
            targets,
            bias=bias,
            low_rank=low_rank,
            softcap=softcap,
            workspace_bytes=workspace_bytes,
            temperature=temperature,
            row_mask=row_mask,
            vocab_size=vocab_size,
            process_group=process_group,
            backend=backend,
        )[:2]
    )


def linear_token_stats_with_lse(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, **options: Any
) -> LseStats:
    """`token_stats_with_lse` of those logits; `options` are those of `linear_token_stats`.

    All three are differentiable, the lse for no more work.
    """
    return LseStats(*_stats(hidden, lm_head_weight, targets, **options))


def _stats(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    workspace_bytes: int = 2**30,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs, entropy and lse, [...] each."""
    projection, valid, shard = check_inputs(
        hidden, lm_head_weight, low_rank, bias, targets, temperature, softcap, vocab_size,
        workspace_bytes, backend, process_group, row_mask,
    )  # fmt: skip
    stats_op, *_ = served_by(shard)
    rows = Rows(valid, valid, listed=None, only_active=False)
    log_probs, entropy, lse, _ = stats_op(projection, rows, None)
    shape = targets.shape
    return log_probs.view(shape), entropy.view(shape).clone(), lse.view(shape)
