"""The model as the trainer sees it: packed rows in, statistics or a loss out of one forward."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from rft_kernels import LMHead, PolicyConfig, PolicyLoss, TokenStats, patch_lm_head
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from prefix_rft.checks import ConfigError
from prefix_rft.data_types import TrainBatch
from prefix_rft.methods import TokenLoss
from prefix_rft.model.attention import LEAN_SDPA
from prefix_rft.model.distributed import gathered, shard_module
from prefix_rft.model.lora import decoder_layers

_MAX_LOGITS_DIFFERENCE = 0.05  # fraction of the largest logit; above what bfloat16 loses


class Policy(nn.Module):
    """A model as the trainer sees it, at one temperature; all it computes is one forward.

    Args:
        model: a causal language model; its lm_head becomes an `LMHead`, its `sdpa` attention
            `LEAN_SDPA`.
        temperature: of every log-prob and entropy.
        vocab_size: the largest id of the tokenizer + 1; columns past it take no part in the
            softmax.
        autocast_dtype: of forward and backward; None: the weights' own.
        device: of the compute; None: where the weights are.
    Raises:
        ConfigError: the model has no lm_head or fewer columns than `vocab_size`, or fails
            `check_forward` (which weights on the meta device can only take later).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        vocab_size: int,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if head is None:
            raise ConfigError(
                f"model.path: expected a causal language model, {type(model).__name__} has no "
                "lm_head"
            )
        if not 1 <= vocab_size <= len(head.weight):
            raise ConfigError(
                f"model.path: the tokenizer has ids up to {vocab_size - 1}, the lm_head "
                f"{len(head.weight)} columns"
            )
        patch_lm_head(model, vocab_size=vocab_size)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(LEAN_SDPA)
        self.model = model
        self.temperature = temperature
        self.device = model.device if device is None else device
        self.autocast_dtype = autocast_dtype
        if not model.device.type == "meta":
            self.check_forward()

    @property
    def lm_head(self) -> LMHead:
        return self.model.get_output_embeddings()

    @property
    def stats_dtype(self) -> torch.dtype:
        """Of log-probs, entropies and the loss: float64 where the weights are, else float32."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def forward(
        self, batch: TrainBatch, *head_inputs: torch.Tensor | None, **head_options: Any
    ) -> torch.Tensor | TokenStats | PolicyLoss:
        """The lm_head's forward on the hidden states of the packed rows."""
        with self._autocast():
            return self.lm_head(self.hidden_states(batch), *head_inputs, **head_options)

    @torch.no_grad()
    def token_stats(self, batch: TrainBatch, *, temperature: float | None = None) -> TokenStats:
        """Log-probs and entropies [T] of the response tokens, 0 elsewhere; without gradient.

        Args:
            temperature: None: the policy's.
        """
        temperature = self.temperature if temperature is None else temperature
        return self(batch, batch.targets, row_mask=batch.response_mask, temperature=temperature)

    def loss(
        self, batch: TrainBatch, *, normalizer: float, loss: PolicyConfig | TokenLoss
    ) -> PolicyLoss:
        """The sum of the tokens' losses over `normalizer`; statistics of rows with a gradient only.

        Args:
            batch: `old_log_probs` None means those of this forward.
            normalizer: of the whole mini-batch.
            loss: the clipped objective's options, or a function.
        """
        if isinstance(loss, TokenLoss):
            return self._token_loss(batch, normalizer, loss)
        selected = batch.response_mask if batch.selected_mask is None else batch.selected_mask
        return self(
            batch,
            batch.targets,
            batch.old_log_probs,
            batch.advantages,
            batch.response_mask,
            batch.prefix_mask,
            normalizer=normalizer,
            config=loss,
            temperature=self.temperature,
            cu_seqlens=batch.cu_seqlens,
            selected_mask=selected,
            rollout_log_probs=batch.rollout_log_probs,
            ref_log_probs=batch.ref_log_probs,
            stats="active",
            active_rows=batch.active_rows,
        )

    def _token_loss(self, batch: TrainBatch, normalizer: float, loss: TokenLoss) -> PolicyLoss:
        inputs = [getattr(batch, name) for name in loss.inputs]
        if "ref_log_probs" in loss.inputs and batch.ref_log_probs is None:
            raise ValueError("ref_log_probs: a method that takes them says so by uses_reference")

        def function(log_probs: torch.Tensor, entropy: torch.Tensor, *given: torch.Tensor):
            # None stands for old log-probs, when the policy has not moved yet.
            tokens = iter(given)
            filled = (log_probs.detach() if x is None else next(tokens) for x in inputs)
            return loss.function(log_probs, entropy, *filled)

        return self(
            batch,
            batch.targets,
            loss_fn=function,
            tokens=tuple(x for x in inputs if x is not None),
            mask=batch.loss_mask,
            normalizer=normalizer,
            temperature=self.temperature if loss.temperature is None else loss.temperature,
            stats="active",
            active_rows=batch.active_rows,
        )

    def shard(self, mesh: DeviceMesh, *, cpu_offload: bool) -> None:
        """Share the weights over the ranks of `mesh`: each decoder layer and an untied lm_head is
        gathered when it is needed, the rest once a forward.
        """
        _, layers = decoder_layers(self.model)
        tied = self.lm_head.weight is self.model.get_input_embeddings().weight
        parts = [*layers] if tied else [*layers, self.lm_head]
        shard_module(self, parts, mesh, param_dtype=self.autocast_dtype, cpu_offload=cpu_offload)
        self.autocast_dtype = None  # the weights are gathered in it

    def gathered(self) -> AbstractContextManager:
        """While entered, `model` can be called by itself on every rank. Collective."""
        return gathered(self)

    def _autocast(self) -> AbstractContextManager:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled)

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
        output = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,  # with a cache transformers does not see that the rows are packed
            **options,
        )
        return output.last_hidden_state[0]

    @torch.no_grad()
    def check_forward(self) -> None:
        """Compare a packed row's logits, as the loss forms them, with those of the model alone.

        Raises:
            ConfigError: the model mixes packed rows, or computes its logits otherwise than by
                lm_head, softcap and a known scale.
        """
        ids = torch.arange(5, device=self.device) % self.lm_head.vocab_size
        nothing = torch.zeros(5, dtype=torch.bool, device=self.device)
        batch = TrainBatch(
            input_ids=ids,
            position_ids=torch.tensor([0, 1, 0, 1, 2], device=self.device),
            targets=ids,
            cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32, device=self.device),
            lengths=(2, 3),
            response_mask=nothing,
            prefix_mask=nothing,
            advantages=ids.float(),
            weights=ids.float(),
            rollout_log_probs=ids.float(),
        )
        logits = self(batch)[2:].float()
        if self.lm_head.softcap is not None:
            logits = self.lm_head.softcap * torch.tanh(logits / self.lm_head.softcap)
        logits = logits / self.lm_head.logits_divisor
        with self.gathered(), self._autocast():
            expected = self.model(input_ids=ids[None, 2:], use_cache=False).logits[0].float()
        difference = (logits - expected).abs().max().item()
        scale = expected.abs().max().item()
        if not difference <= _MAX_LOGITS_DIFFERENCE * scale:
            raise ConfigError(
                f"model.path: {type(self.model).__name__} is not supported: the logits of a packed "
                f"row are off by {difference:.2g} (largest logit {scale:.2g}) from the row alone"
            )
