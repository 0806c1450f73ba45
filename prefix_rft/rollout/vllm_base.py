"""What the two engines of vLLM share: how they are constructed, and which calls they refuse."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_rft.config import VLLMConfig
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.rollout.engine import check_call
from prefix_rft.rollout.stop_text import StopText
from prefix_rft.rollout.vllm_options import (
    sequence_limit,
    stop_token_ids,
    unties_weights,
    weight_dtype,
)

_MIB = 2**20


class VLLMBase:
    """A `RolloutEngine` whose weights are pushed to vLLM; it holds none before the first push.

    Args:
        model: a causal language model of transformers, possibly sharded; only its configuration
            and dtype are read here.
        config: the section `[vllm]`.
        device: where the trainer computes; vLLM must use the same kind.
        max_length: longest sequence in tokens; the model's own limit applies as well.
        eos_token_ids: each of them ends a completion.
        stop_text: ends a completion too. vLLM generates on; what follows it is cut off.
        vocab_size: the largest id of the tokenizer + 1. The engine's model is cut there, so ids
            past it are never sampled and take no part in the softmax.
        max_batch_sequences: sequences this process has generated at once.
        autocast_dtype: of the engine's weights and forward; None: the dtype of the model's weights.
    Raises:
        ConfigError: vLLM is not installed, or cannot run the model with these settings.
        ValueError: no end-of-sequence token below `vocab_size`.
    """

    shares_module = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: VLLMConfig,
        device: torch.device,
        max_length: int,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_batch_sequences: int,
        stop_text: StopText | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.weights_version: int | None = None
        self._stop_token_ids = stop_token_ids(eos_token_ids, vocab_size)
        self._stop_text = stop_text
        self._max_length = sequence_limit(model.config, max_length)
        self._max_batch_sequences = max_batch_sequences
        self._bucket_bytes = config.weight_bucket_mib * _MIB
        self._weight_options: dict[str, Any] = {
            "dtype": weight_dtype(autocast_dtype or model.dtype),
            "vocab_size": vocab_size,
            "unties": unties_weights(device),
        }
        self._start(config, device, model.config)

    def _start(
        self, config: VLLMConfig, device: torch.device, model_config: PreTrainedConfig
    ) -> None:
        """Start vLLM, or connect to it. Collective."""
        raise NotImplementedError

    def ignore_ends(self) -> None:
        """See `RolloutEngine.ignore_ends`; vLLM is asked to ignore the model's own ends anyway."""
        self._stop_token_ids, self._stop_text = [], None

    def _cut(self, completion: Completion) -> Completion:
        return completion if self._stop_text is None else self._stop_text.cut(completion)

    def _check(
        self, requests: Sequence[RolloutRequest], temperature: float, weights_version: int
    ) -> None:
        check_call(
            requests,
            temperature=temperature,
            asked_version=weights_version,
            version=self.weights_version,
            max_length=self._max_length,
            max_length_source="data.max_prompt_tokens + max_response_length, or the model's own",
        )
