"""TRL's log-prob and entropy functions, with the signatures of TRL 1.16, from logits and hidden.

The trainers of 1.16 project their heads in `ChunkedLogProbFunction`; what takes logits serves
others. One difference by intent: results are float32 whatever the logits (float64 for float64), as
TRL's own kernels give on a GPU; its plain torch path rounds to the dtype of the logits.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..results import stats_dtype
from ..rows import token_stats
from ._linear import TILE_ROWS, head_stats, logits_by_tiles
from ._patch import Patch, install, refusing

_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of chosen classes.

        log_softmax(logits / temperature).gather(-1, index)

    Args:
        logits: [..., V].
        index: [...], one class a row, or [..., K].
        temperature: above 0.
        row_mask: the shape of `index`; entries of 0 give 0.
    Returns:
        The shape of `index`, float32 (float64 for float64 logits), nats.
    Raises:
        TypeError, ValueError: as `token_stats`.
    Differentiable in `logits`. K classes a row cost one reading more than one class.
    """
    if index.dim() < logits.dim():
        keep = None if row_mask is None else row_mask != 0
        return token_stats(logits, index, temperature=temperature, row_mask=keep).log_probs
    _check.number("temperature", temperature, above=0)
    shape = (*logits.shape[:-1], index.shape[-1])
    _check.tensor("index", index, dtypes=_check.INTEGERS, shape=shape, like=logits)
    if row_mask is not None:
        _check.tensor("row_mask", row_mask, dtypes=(), shape=index.shape, like=logits)
    # Measured from the likeliest class, whose log-prob is finite and whose logit is near the
    # others' that matter: adding lse itself would round where logits are large.
    best = logits.detach().argmax(-1)
    log_probs = token_stats(logits, best, temperature=temperature).log_probs
    picked = logits.gather(-1, torch.cat([best[..., None], index], -1)).to(
        stats_dtype(logits.dtype)
    )
    log_probs = (picked[..., 1:] - picked[..., :1]) / temperature + log_probs[..., None]
    return log_probs if row_mask is None else torch.where(row_mask != 0, log_probs, 0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of softmax(logits), [...], nats; differentiable. `chunk_size` is not needed here."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, index).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of one class a row, and entropy of the row, from one reading.

    Args:
        logits: [..., V].
        index: [...].
        entropy_requires_grad: whether the entropy is differentiable as well.
        temperature: above 0.
        row_mask: [...]; rows of 0 are not read and give 0.
    Returns:
        (log_probs, entropy), [...] each, float32 (float64 for float64 logits), nats.
    Raises:
        TypeError, ValueError: as `token_stats`.
    """
    keep = None if row_mask is None else row_mask != 0
    log_probs, entropy = token_stats(logits, index, temperature=temperature, row_mask=keep)
    return log_probs, entropy if entropy_requires_grad else entropy.detach()


def kernels_selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax_and_entropy` with the signature that it has in `trl.kernels`."""
    return selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)


def get_high_entropy_mask(
    entropies: Tensor, mask: Tensor, threshold: float, *, accelerator: Any = None
) -> Tensor:
    """Tokens whose entropy is at least the `threshold` quantile: TRL's rule, to the bit.

    The quantile is the interpolated one of `torch.quantile` over the tokens of `mask`, so that
    all tokens equal to it are kept and their number is not exact: `select_top_entropy` is the op
    for an exact share. Here too no value is read on the host, which TRL's own must do.

    Args:
        entropies: [B, L] float, nats.
        mask: [B, L], 0 or False for padding.
        threshold: 0 to 1; TRL passes 1 - top_entropy_quantile.
        accelerator: of the trainer; the quantile is then over all its processes.
    Returns:
        [B, L] bool. All False without tokens. (A NaN entropy is left out; in TRL it empties the
        mask.)
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    _check.tensor("entropies", entropies)
    _check.tensor("mask", mask, dtypes=(), shape=entropies.shape, like=entropies)
    _check.number("threshold", threshold, least=0, most=1)
    mask = mask.bool()
    values = torch.where(mask, entropies.float(), torch.nan)
    pool = values.flatten()
    if accelerator is not None:
        padded = accelerator.pad_across_processes(pool, dim=0, pad_index=torch.nan)
        pool = accelerator.gather(padded)
    if not pool.numel():
        return mask
    # `torch.nanquantile` by hand: its own refuses more than 2^24 entries, NaN or not.
    ordered = pool.sort().values  # NaN last
    num_tokens = ordered.isnan().logical_not().sum()
    rank = (num_tokens.sub(1).clamp(min=0) * torch.tensor(threshold, dtype=pool.dtype)).to(pool)
    below, above = (ordered.take(place.long()) for place in (rank.floor(), rank.ceil()))
    return values >= below.lerp(above, rank - rank.floor())


class ChunkedLogProbFunction:
    """The head of TRL's trainers, which they call as an autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Statistics of the rows of hidden @ weight.T, which never exists whole.

            logits = s (hidden @ weight.T + bias),  softcap c: logits = c tanh(logits / c)

        Args:
            hidden: [N, D]; under autocast the product is in its dtype, as a linear layer's is.
            weight, bias: [V, D], [V].
            targets: [N] int64; -100 gives 0.
            temperature: above 0; all outputs are of logits / temperature.
            chunk_size: not needed here.
            final_logit_softcapping: the c above.
            logit_scale: the s above, greater than 0.
            outputs: which of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1" are wanted;
                any of the last three costs another projection.
        Returns:
            (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each, None where not
            wanted; float32 (float64 for float64 hidden), the last one bool.
        Raises:
            TypeError, ValueError: as `linear_token_stats`.
            NotImplementedError: a weight that DeepSpeed ZeRO-3 has partitioned.
        log_probs and entropy are differentiable once in `hidden`, `weight` and `bias`.
        """
        if hasattr(weight, "ds_id"):
            raise NotImplementedError(
                "weight must be whole, got one that DeepSpeed ZeRO-3 partitions again before the "
                "backward"
            )
        _check.number("temperature", temperature, above=0)
        _check.number("logit_scale", logit_scale, above=0)
        unknown = set(outputs) - {"log_probs", *_OUTPUTS}
        if unknown:
            raise ValueError(
                f"outputs must be among log_probs, {', '.join(_OUTPUTS)}, got {sorted(unknown)}"
            )
        # A scale before the cap is a smaller cap and temperature: exact, and in 16 bits too.
        temperature = temperature / logit_scale
        softcap = final_logit_softcapping
        softcap = None if softcap is None else softcap / logit_scale
        log_probs, entropy = head_stats(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap
        )
        others = _of_logits(hidden, weight, bias, targets, temperature, softcap, outputs)
        return log_probs, entropy if "entropy" in outputs else None, *others


@torch.no_grad()
def _of_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: float,
    softcap: float | None,
    outputs: tuple[str, ...],
) -> list[Tensor | None]:
    """What the statistics do not have, those of `outputs`: metrics of TRL's, of no gradient."""
    functions = {
        "log_sum_sq_probs": lambda z, y: (2 * z).logsumexp(-1) - 2 * z.logsumexp(-1),
        "mean_logits": lambda z, y: z.mean(-1),
        "is_top1": lambda z, y: z.argmax(-1) == y,
    }
    found: dict[str, list[Tensor]] = {name: [] for name in functions if name in outputs}
    tiles = zip(logits_by_tiles(hidden, weight, bias), targets.split(TILE_ROWS), strict=True)
    for z, y in tiles if found else ():
        z = z if softcap is None else softcap * (z / softcap).tanh()
        for name, parts in found.items():
            parts.append(functions[name](z / temperature, y))
    return [torch.cat(found[name]) if name in found else None for name in functions]


def _get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
    return get_high_entropy_mask(entropies, mask, threshold, accelerator=self.accelerator)


def patch() -> Patch:
    """Serves TRL's trainers from here, built already or not, until the handle is undone.

    Raises:
        ImportError: TRL, or a name expected in it, is missing.
    """
    utils = "trl.trainer.utils"
    fused = kernels_selective_log_softmax_and_entropy
    return install(
        "trl",
        {
            f"{utils}:selective_log_softmax": selective_log_softmax,
            f"{utils}:entropy_from_logits": entropy_from_logits,
            f"{utils}:selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
            "trl.kernels:ChunkedLogProbFunction": ChunkedLogProbFunction,
            "trl.trainer.grpo_trainer:GRPOTrainer.get_high_entropy_mask": _get_high_entropy_mask,
        },
        # TRL has it where it finds triton.
        {"trl.kernels:selective_log_softmax_and_entropy": fused},
    )


__getattr__ = refusing(
    __name__, {"ChunkedDivergenceFunction": "a row of it has the distributions of two models"}
)
