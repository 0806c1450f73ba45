"""Liger's GRPO losses from hidden states, with the signatures of Liger 0.8.5; see `_grpo`.

B sequences, L completion tokens, V classes, D hidden size.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .._check import NO_TARGET
from ._grpo import Options, check_shapes, metrics, reduced, token_losses
from ._linear import head_stats


class LigerFusedLinearGRPOFunction:
    """What Liger's `LigerFusedLinearGRPOLoss` calls, from hidden states."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The losses of the GRPO family; the logits never exist whole.

        Args:
            _input: [B, L, D].
            weight: [V, D]; cast to the dtype of `_input`, as `bias` [V] is.
            selected_token_ids: [B, L] int.
            attention_mask: [B, L], 0 outside the loss.
            advantages: [B].
            ref_per_token_logps: [B, L]; or `ref_input` [B, L, D] with `ref_weight` [V, D] and
                `ref_bias` [V]. Needed where `use_ref_model` and `beta` is not 0.
            old_per_token_logps: [B, L], or None: on-policy.
            compiled, chunk_size: not needed here.
            vllm_is_ratio: [B, L], [B, 1] or [B], the weight of the policy term.
            others: numbers as Liger documents them.
        Returns:
            (loss, (mean kl where beta is not 0, mean of is_clipped)), 0-dim each.
        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, value or combination.
        Differentiable once in `_input`, `weight` and `bias`. What is outside the mask does not
        count, but for "luspo": Liger's mean is over padding as well, and so is this.
        """
        options = Options(
            loss_type,
            importance_sampling_level,
            beta,
            epsilon_low,
            epsilon_high,
            delta,
            use_bias_correction_kl,
            sapo_temperature_pos,
            sapo_temperature_neg,
            vespo_k_pos,
            vespo_lambda_pos,
            vespo_k_neg,
            vespo_lambda_neg,
        )
        options.check()
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type 'dr_grpo'")
        check_shapes(
            _input,
            advantages,
            vllm_is_ratio,
            num_items_in_batch,
            selected_token_ids=selected_token_ids,
            attention_mask=attention_mask,
            old_per_token_logps=old_per_token_logps,
            ref_per_token_logps=ref_per_token_logps,
        )
        inside = attention_mask != 0
        counted = torch.ones_like(inside) if loss_type == "luspo" else inside
        targets = torch.where(counted, selected_token_ids, NO_TARGET)
        log_probs = head_stats(
            _input, weight, targets, bias=bias, temperature=temperature
        ).log_probs
        ref = ref_per_token_logps
        if beta != 0 and not use_ref_model:
            ref = log_probs.detach()
        elif beta != 0 and ref is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "ref_per_token_logps, or ref_input and ref_weight, must be given: "
                    "use_ref_model is True and beta is not 0"
                )
            with torch.no_grad():
                ref = head_stats(
                    ref_input, ref_weight, targets, bias=ref_bias, temperature=temperature
                ).log_probs
        mask = inside.to(log_probs.dtype)
        loss, kl, is_clipped = token_losses(
            log_probs, old_per_token_logps, ref, advantages, vllm_is_ratio, counted, mask, options
        )
        if loss_type != "luspo":
            loss = torch.where(inside, loss, 0)
        total = reduced(loss, mask, loss_type, max_completion_length, num_items_in_batch)
        return total, tuple(metrics(mask, kl, is_clipped))


@dataclass(eq=False)
class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Liger's module of that name: its options, its call, its (loss, metrics)."""

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        super().__init__()

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `LigerFusedLinearGRPOFunction.apply`."""
        return LigerFusedLinearGRPOFunction.apply(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **{field.name: getattr(self, field.name) for field in fields(self)},
        )
