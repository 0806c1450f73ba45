"""Liger's GRPO losses from logits, with the signatures of Liger 0.8.5.

B sequences, L completion tokens, V classes. Liger's losses are functions of the log-probability
alone: `_grpo` has them in O(B L) of torch, and the vocabulary-sized work is ours.
"""

import torch
from torch import Tensor

from .._check import NO_TARGET
from ..rows import token_stats
from ._grpo import Options, check_shapes, metrics, reduced, token_losses


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple:
    """The losses of the GRPO family from logits; arguments, defaults and results are Liger's.

    Args:
        logits: [B, L + 1, V]; the last row of a sequence predicts nothing and gets no gradient.
        old_logp: [B, L], or None: on-policy.
        ref_logp: [B, L], where `beta` is not 0.
        completion_ids: [B, L] int.
        advantages: [B].
        completion_mask: [B, L], 0 outside the loss, or None.
        inplace: the backward writes the gradient over `logits`.
        loss_type: "grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo" or "vespo".
        vllm_is_ratio: [B, L], [B, 1] or [B], the weight of the policy term.
        others: numbers as Liger documents them.
    Returns:
        (loss, kl or None, is_clipped), [B, L] float32 each, 0 outside the mask; with `reduce`
        (loss, [mean kl where beta is not 0, mean of is_clipped]), 0-dim.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, value or combination.
    Differentiable once in `logits` through the loss. Rows outside the mask are not read.
    """
    options = Options(
        loss_type,
        importance_sampling_level,
        beta,
        eps_low,
        eps_high,
        delta,
        use_bias_correction_kl,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vespo_k_pos,
        vespo_lambda_pos,
        vespo_k_neg,
        vespo_lambda_neg,
    )
    return _loss_from_logits(
        logits,
        old_logp,
        ref_logp,
        completion_ids,
        advantages,
        completion_mask,
        options,
        temperature,
        inplace,
        max_completion_length,
        reduce,
        vllm_is_ratio,
        num_items_in_batch,
    )


def _loss_from_logits(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None,
    options: Options,
    temperature: float,
    inplace: bool,
    max_completion_length: int | None,
    reduce: bool,
    vllm_is_ratio: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    phi_seq: Tensor | None = None,  # [B, 1], of "vespo"
) -> tuple:
    """As `triton_grpo_loss`."""
    options.check()
    if options.beta != 0 and ref_logp is None:
        raise ValueError("ref_logp must be given, as beta is not 0")
    check_shapes(
        logits[:, 1:],
        advantages,
        vllm_is_ratio,
        num_items_in_batch,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        old_logp=old_logp,
        ref_logp=ref_logp,
    )
    if completion_mask is None:
        inside = torch.ones_like(completion_ids, dtype=torch.bool)
    else:
        inside = completion_mask != 0
    targets = torch.where(inside, completion_ids, NO_TARGET)
    targets = torch.nn.functional.pad(targets, (0, 1), value=NO_TARGET)
    log_probs = token_stats(
        logits, targets, temperature=temperature, inplace_backward=inplace
    ).log_probs[:, :-1]
    mask = inside.to(log_probs.dtype)
    loss, kl, is_clipped = token_losses(
        log_probs, old_logp, ref_logp, advantages, vllm_is_ratio, inside, mask, options, phi_seq
    )
    loss = torch.where(inside, loss, 0)  # a ratio of the sequence spreads over its tokens here
    if reduce:
        total = reduced(loss, mask, options.loss_type, max_completion_length, num_items_in_batch)
        return total, metrics(mask, kl, is_clipped)
    kl = None if kl is None else torch.where(inside, kl, 0).detach()
    return loss, kl, torch.where(inside, is_clipped, False).to(log_probs.dtype)


class GrpoLossFunction:
    """What Liger's `triton_grpo_loss` calls, and who has no use for its defaults."""

    @staticmethod
    def apply(
        logits: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        completion_ids: Tensor,
        advantages: Tensor,
        completion_mask: Tensor | None,
        temperature: float,
        beta: float,
        eps_low: float,
        eps_high: float,
        inplace: bool,
        loss_type: str = "grpo",
        max_completion_length: int | None = None,
        reduce: bool = True,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        phi_seq: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `triton_grpo_loss`, but for `phi_seq` and three results with `reduce` as well.

        Args:
            phi_seq: [B] or [B, 1], the weight of a sequence in "vespo", which needs it.
        Returns:
            (loss, kl or None, is_clipped); with `reduce` the loss and two means, 0-dim.
        """
        options = Options(
            loss_type,
            importance_sampling_level,
            beta,
            eps_low,
            eps_high,
            delta,
            use_bias_correction_kl,
            sapo_temperature_pos,
            sapo_temperature_neg,
            *[1.0] * 4,  # vespo's, which are in phi_seq
        )
        if loss_type == "vespo":
            if phi_seq is None or phi_seq.shape not in (advantages.shape, (len(advantages), 1)):
                raise ValueError(
                    f"phi_seq must have shape [{len(advantages)}] or [{len(advantages)}, 1] for "
                    f"loss_type 'vespo', got {None if phi_seq is None else list(phi_seq.shape)}"
                )
            phi_seq = phi_seq.detach().reshape(-1, 1)
        found = _loss_from_logits(
            logits,
            old_logp,
            ref_logp,
            completion_ids,
            advantages,
            completion_mask,
            options,
            temperature,
            inplace,
            max_completion_length,
            reduce,
            vllm_is_ratio,
            num_items_in_batch,
            phi_seq,
        )
        if not reduce:
            return found
        loss, (*kl, clipped) = found
        return loss, kl[0] if kl else None, clipped


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the last L of `input_ids`, [B, L] float32, without a gradient.

    Args:
        logits: [B, L + 1, V]; the last row of a sequence predicts nothing.
        input_ids: [B, L or more] int.
        temperature: above 0.
        mask: [B, L or more], 0 where the result is 0, or None.
    Raises:
        TypeError, ValueError: as `token_stats`.
    """
    length = logits.shape[1] - 1
    ids = input_ids[:, input_ids.shape[1] - length :]
    keep = None if mask is None else mask[:, mask.shape[1] - length :] != 0
    return token_stats(logits[:, :-1], ids, temperature=temperature, row_mask=keep).log_probs
