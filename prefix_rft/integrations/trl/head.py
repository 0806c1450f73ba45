"""The lm_head of a model in TRL, made to end in the loss of the kernels."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from rft_kernels import LMHead, PolicyConfig, PolicyLoss, patch_lm_head
from torch import Tensor
from transformers import PreTrainedModel

from prefix_rft.checks import ConfigError

OfHead = Callable[[Tensor, LMHead], PolicyLoss]  # (hidden [B, L, D], lm_head)


def add_loss(model: PreTrainedModel) -> None:
    """Let `model(..., loss_of_head=f)` return f(hidden, lm_head); all else stays as it is.

    The loss is made within the forward, where wrappers such as DistributedDataParallel expect it.

    Args:
        model: not yet wrapped; without the adapters of peft.
    Raises:
        ConfigError: its lm_head is no plain linear layer.
    """
    try:
        patch_lm_head(model)
    except ValueError as error:
        raise ConfigError(f"head: {error}; head = 'trl' takes it") from error
    forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads its signature
    def with_loss(self, *args: Any, loss_of_head: OfHead | None = None, **kwargs: Any) -> Any:
        if loss_of_head is None:
            return forward(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        out = loss_of_head(hidden, self.get_output_embeddings())
        return {"loss": out.loss, "log_probs": out.log_probs, "entropy": out.entropy}

    model.forward = MethodType(with_loss, model)


def fused_loss(
    model: torch.nn.Module,
    inputs: dict[str, Tensor],
    *,
    accelerator: Accelerator,
    config: PolicyConfig,
    normalizer: float | Tensor,
    temperature: float,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy loss of a micro-batch from one forward and one pass over its logits.

    Args:
        model: prepared by `add_loss`, wrapped or not.
        inputs: B rows of at most P prompt and C completion tokens, as the trainer buffers them:
            "prompt_ids", "prompt_mask" [B, P]; "completion_ids", "completion_mask", "advantages",
            "prefix_mask" and "tool_mask", the tokens in the loss, [B, C]; where TRL has them
            "old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio".
        normalizer: the sum over tokens is divided by it.
        row_weights: [B], of the tokens of a row.
    Returns:
        (loss, log_probs [B, C], entropy [B, C]), the latter two 0 outside the completions.
    """
    is_token = inputs["completion_mask"].bool()
    advantages = inputs["advantages"]
    # The clipped objective is linear in a factor that is not negative.
    for factor in (inputs.get("importance_sampling_ratio"), row_weights):
        if factor is not None:
            advantages = advantages * (factor if factor.dim() == 2 else factor[:, None])

    def flat(name: str) -> Tensor | None:
        values = inputs.get(name)
        return None if values is None else values[is_token].float()

    def loss_of_head(hidden: Tensor, head: LMHead) -> PolicyLoss:
        before = hidden[:, -is_token.shape[1] - 1 : -1]  # what predicts the completion
        return head(
            before[is_token],
            inputs["completion_ids"][is_token],
            flat("old_per_token_logps"),
            advantages[is_token].float(),
            is_token[is_token],
            inputs["prefix_mask"][is_token],
            normalizer=normalizer,
            config=config,
            temperature=temperature,
            selected_mask=inputs["tool_mask"].bool()[is_token],
            ref_log_probs=flat("ref_per_token_logps"),
        )

    with accelerator.autocast():
        out = model(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            loss_of_head=loss_of_head,
        )
    padded = (
        torch.zeros(is_token.shape, dtype=out[name].dtype, device=is_token.device).masked_scatter(
            is_token, out[name]
        )
        for name in ("log_probs", "entropy")
    )
    return out["loss"], *padded
