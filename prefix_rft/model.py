"""The model as the trainer sees it: the packed forward, and the lm_head through rft_kernels."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from rft_kernels import (
    PolicyConfig,
    PolicyLoss,
    TokenStats,
    linear_prefix_rft_loss,
    linear_token_stats,
)
from transformers import (
    PreTrainedModel,
)

from prefix_rft.attention import LEAN_SDPA
from prefix_rft.config import ConfigError
from prefix_rft.data_types import TrainBatch

_MAX_LOGITS_DIFFERENCE = 0.05  # share of the largest logit; above what bfloat16 loses


class Policy:
    """A model as the trainer sees it: packed rows in, statistics and loss at one temperature out.

    Args:
        model: a causal language model; its `sdpa` attention is replaced by `LEAN_SDPA`.
        temperature: of every log-prob and entropy.
        vocab_size: tokens of the tokenizer; columns past it take no part in the softmax.
        autocast_dtype: of the forward; None: the weights' dtype.
    Raises:
        ConfigError: the model has no lm_head or fewer columns than `vocab_size`, mixes packed rows,
            or computes its logits otherwise than by lm_head, softcap and a known scale.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        vocab_size: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ConfigError(
                f"model.path: expected a causal language model, {type(model).__name__} has no "
                "lm_head"
            )
        if not 1 <= vocab_size <= len(head.weight):
            raise ConfigError(
                f"model.path: the tokenizer has {vocab_size} tokens, the lm_head "
                f"{len(head.weight)} columns"
            )
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(LEAN_SDPA)
        text_config = model.config.get_text_config()
        self.model = model
        self.vocab_size = vocab_size
        self.autocast_dtype = autocast_dtype
        self._softcap = getattr(text_config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them: both are a temperature.
        divisor = getattr(text_config, "logits_scaling", None) or 1.0
        factor = getattr(text_config, "logit_scale", None) or 1.0
        self._temperature = temperature * divisor / factor
        self._check_forward(divisor / factor)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def stats_dtype(self) -> torch.dtype:
        """Of log-probs, entropies and the loss: float64 where the weights are, else float32."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def hidden_states(self, batch: TrainBatch) -> torch.Tensor:
        """What the lm_head reads, [T, D]; every row is computed as if it were alone."""
        lengths = {"max_length_q": max(batch.lengths), "max_length_k": max(batch.lengths)}
        rows = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens, **lengths}
        attention = self.model.config._attn_implementation
        options: dict[str, Any] = {}
        if attention == LEAN_SDPA:
            # A 4-d mask passes as it is: transformers then builds no [T, T] one.
            options = rows | {"attention_mask": torch.zeros(1, 1, 1, 1, device=self.device).bool()}
        elif attention == "flash_attention_2":
            options = rows
        with self._autocast():
            output = self.model.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,  # with a cache transformers does not see that the rows are packed
                **options,
            )
        return output.last_hidden_state[0]

    @torch.no_grad()
    def token_stats(self, batch: TrainBatch) -> TokenStats:
        """Log-probs and entropies [T] of the response tokens, 0 elsewhere; without gradient."""
        hidden, weight, options = self._head(batch)
        return linear_token_stats(
            hidden, weight, batch.targets, row_mask=batch.response_mask, **options
        )

    def policy_loss(
        self, batch: TrainBatch, *, normalizer: float, config: PolicyConfig
    ) -> PolicyLoss:
        """The clipped objective of `batch`; statistics are reported of rows with a gradient only.

        Args:
            batch: with `selected_mask`; `old_log_probs` None means those of this forward.
            normalizer: num_rollouts * max_response_length of the whole mini-batch.
        Raises:
            ValueError: `batch.selected_mask` is missing: a selection here would depend on the
                micro-batch.
        """
        if batch.selected_mask is None:
            raise ValueError("batch.selected_mask: expected a mask of the prefix tokens, got None")
        hidden, weight, options = self._head(batch)
        return linear_prefix_rft_loss(
            hidden,
            weight,
            batch.targets,
            batch.old_log_probs,
            batch.advantages,
            batch.response_mask,
            batch.prefix_mask,
            normalizer=normalizer,
            config=config,
            cu_seqlens=batch.cu_seqlens,
            selected_mask=batch.selected_mask,
            rollout_log_probs=batch.rollout_log_probs,
            stats="active",
            **options,
        )

    def _head(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Hidden states, lm_head weight and options of the linear ops, in the forward's dtype."""
        head = self.model.get_output_embeddings()
        dtype = self.autocast_dtype or head.weight.dtype
        bias = getattr(head, "bias", None)
        options = {
            "bias": None if bias is None else bias.to(dtype),
            "softcap": self._softcap,
            "temperature": self._temperature,
            "vocab_size": self.vocab_size,
        }
        return self.hidden_states(batch).to(dtype), head.weight.to(dtype), options

    def _autocast(self) -> AbstractContextManager:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled)

    @torch.no_grad()
    def _check_forward(self, logits_divisor: float) -> None:
        """Compare a packed row's logits, as the loss forms them, with those of the model alone."""
        ids = torch.arange(5, device=self.device) % self.vocab_size
        lengths = (2, 3)
        bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=self.device)
        nothing = torch.zeros(5, dtype=torch.bool, device=self.device)
        batch = TrainBatch(
            input_ids=ids,
            position_ids=torch.tensor([0, 1, 0, 1, 2], device=self.device),
            targets=ids,
            cu_seqlens=bounds,
            lengths=lengths,
            response_mask=nothing,
            prefix_mask=nothing,
            advantages=ids.float(),
            rollout_log_probs=ids.float(),
        )
        hidden, weight, options = self._head(batch)
        logits = torch.nn.functional.linear(hidden[2:], weight, options["bias"]).float()
        logits = logits / logits_divisor
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        with self._autocast():
            expected = self.model(input_ids=ids[None, 2:], use_cache=False).logits[0].float()
        difference = (logits - expected).abs().max().item()
        scale = expected.abs().max().item()
        if not difference <= _MAX_LOGITS_DIFFERENCE * scale:
            raise ConfigError(
                f"model.path: {type(self.model).__name__} is not supported: the logits of a packed "
                f"row are off by {difference:.2g} (largest logit {scale:.2g}) from the row alone"
            )
