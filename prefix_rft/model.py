"""The transformers model: loading, the packed forward, the lm_head through rft_kernels, export."""

import os
import shutil
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rft_kernels import (
    PolicyConfig,
    PolicyLoss,
    TokenStats,
    linear_prefix_rft_loss,
    linear_token_stats,
)
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from prefix_rft.attention import LEAN_SDPA
from prefix_rft.config import ConfigError, ModelConfig
from prefix_rft.data_types import TrainBatch

# Classes of which tokenizer.json is the whole tokenizer.
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_MAX_LOGITS_DIFFERENCE = 0.05  # share of the largest logit; above what bfloat16 loses


# Loading


def resolve_device(config: ModelConfig) -> torch.device:
    """The device of `model.device`; a ConfigError where this machine has none of the kind."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device: got {config.device!r}, but torch finds no CUDA device")
    return device


def resolve_autocast_dtype(config: ModelConfig) -> torch.dtype | None:
    """What the forward of float32 weights runs in: bfloat16, or None for the weights' own dtype."""
    is_bfloat16 = config.dtype == "bfloat16" or (
        config.dtype == "auto" and resolve_device(config).type == "cuda"
    )
    return torch.bfloat16 if is_bfloat16 else None


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, a Hugging Face folder or hub id.

    Args:
        chat_template: replaces the tokenizer's own: Jinja text, or the path of a file with it.
    Raises:
        ConfigError: nothing at `path`, no end-of-sequence token, or a template that is neither.
    """
    try:
        tokenizer_class = get_tokenizer_config(path).get("tokenizer_class")
        # For some model types AutoTokenizer puts the family's own pipeline over that of the folder.
        loader = (
            PreTrainedTokenizerFast if tokenizer_class in _GENERIC_TOKENIZERS else AutoTokenizer
        )
        tokenizer = loader.from_pretrained(path)
    except OSError as error:
        raise _not_found(path, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path: the tokenizer of {path} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is always masked, never a target
    if chat_template is not None:
        if os.path.isfile(chat_template):
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        elif "{" not in chat_template:
            raise ConfigError(
                f"model.chat_template: expected a file or Jinja text, got {chat_template!r}"
            )
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(config: ModelConfig, path: str | Path) -> PreTrainedModel:
    """The causal language model at `path`, in training mode, its weights in float32 (or float64).

    Raises:
        ConfigError: nothing at `path`, no causal language model there, weights missing, or an
            override that the model has no place for.
    """
    device = resolve_device(config)
    try:
        model_config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_found(path, "model", error) from error
    _require_causal_lm(model_config, path)
    _override(model_config.get_text_config(), config)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            dtype=torch.float64 if config.dtype == "float64" else torch.float32,
            attn_implementation=_attention(config),
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise _not_found(path, "model", error) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(f"model.path: {path} lacks {len(missing)} weights, first {missing[0]}")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def _attention(config: ModelConfig) -> str | None:
    """A name for transformers; None: its own choice, `sdpa` where the model has it."""
    can_flash = (
        find_spec("flash_attn") is not None
        and resolve_device(config).type == "cuda"
        and resolve_autocast_dtype(config) is not None
    )
    if config.attention == "auto":
        return "flash_attention_2" if can_flash else None
    if config.attention == "flash_attention_2" and not can_flash:
        raise ConfigError(
            "model.attention: flash_attention_2 needs the package flash_attn, a CUDA device and "
            "model.dtype bfloat16"
        )
    return config.attention


def _not_found(path: str | Path, what: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(
        f"model.path: expected a folder with a {what}, or a hub id that can be reached, "
        f"got {str(path)!r} ({reason})"
    )


def _require_causal_lm(config: PreTrainedConfig, path: str | Path) -> None:
    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if is_known else "...ForCausalLM"
    found = config.architectures or [expected if is_known else config.model_type]
    if expected not in found:
        raise ConfigError(
            f"model.path: expected a causal language model with an lm_head ({expected}), "
            f"found {', '.join(found)} in {path}"
        )
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if layers - _PACKABLE_LAYERS:
        raise ConfigError(
            f"model.path: packed rows need layers of {' or '.join(sorted(_PACKABLE_LAYERS))}, "
            f"found {', '.join(sorted(layers))} in {path}"
        )


def _override(text_config: PreTrainedConfig, config: ModelConfig) -> None:
    """Write the overrides of `config` into a transformers configuration; take all dropout out."""
    if config.rope_theta is not None:
        if "rope_theta" not in (getattr(text_config, "rope_parameters", None) or {}):
            raise ConfigError("model.rope_theta: the model has no single rope_theta to replace")
        text_config.rope_parameters["rope_theta"] = config.rope_theta
    if config.max_position_embeddings is not None:
        text_config.max_position_embeddings = config.max_position_embeddings
    for name, value in vars(text_config).items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(text_config, name, 0.0)  # log-probs of two forwards must agree


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and those of the generation config."""
    ids = {tokenizer.eos_token_id}
    found = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return tuple(sorted(ids))


# The packed forward


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


# Export


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write both in Hugging Face format; `folder` is replaced at once or not at all."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists() and replaced.exists():
            replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
