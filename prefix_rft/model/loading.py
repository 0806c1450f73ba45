"""Loads tokenizer and model from a folder or the hub, with checks and overrides; exports them."""

import copy
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import GENERATION_CONFIG_NAME

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, ModelConfig, is_installed, require_package
from prefix_rft.model.distributed import World
from prefix_rft.model.lora import add_adapters, unadapted_weights
from prefix_rft.model.policy import Policy
from prefix_rft.model.weights import full_weights

# Classes for which tokenizer.json is the whole tokenizer.
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_EXPORT_BUCKET_BYTES = 2**30


def resolve_device(config: ModelConfig) -> torch.device:
    """The device `model.device` selects; a ConfigError if this machine does not have it."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device: got {config.device!r}, but torch finds no CUDA device")
    return device


def resolve_autocast_dtype(
    config: ModelConfig, device: torch.device | None = None
) -> torch.dtype | None:
    """The dtype of the forward over float32 weights: bfloat16, or None for that of the weights.

    Args:
        device: where the forward runs; None: the device of `config`.
    """
    if config.dtype == "auto" and device is None:
        device = resolve_device(config)
    is_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if is_bfloat16 else None


def resolve_weight_dtypes(
    config: ModelConfig, device: torch.device | None = None
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the model as loaded and of what is trained; they differ if there are adapters."""
    trained = torch.float64 if config.dtype == "float64" else torch.float32
    if config.lora_rank is None:
        return trained, trained
    return resolve_autocast_dtype(config, device) or trained, trained


def host_config(config: ModelConfig, device: torch.device | None = None) -> ModelConfig:
    """`config` for weights that are only stored and copied, in host memory.

    Args:
        device: where they will be used, which decides their dtypes; None: nowhere.
    """
    if device is not None and resolve_autocast_dtype(config, device) is not None:
        config = replace(config, dtype="bfloat16")
    return replace(config, device="cpu", attention="auto", liger=False)


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, *, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, a Hugging Face folder or hub id.

    Args:
        chat_template: Jinja text, or the path of a file with it; replaces the tokenizer's own.
        local_files_only: do not ask the hub.
    Raises:
        ConfigError: nothing at `path`, no end-of-sequence token, or `chat_template` is neither.
    """
    try:
        options = {"local_files_only": local_files_only}
        tokenizer_class = get_tokenizer_config(path, **options).get("tokenizer_class")
        # For some model types AutoTokenizer replaces the folder's pipeline by that of the family.
        loader = (
            PreTrainedTokenizerFast if tokenizer_class in _GENERIC_TOKENIZERS else AutoTokenizer
        )
        tokenizer = loader.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise _not_found(path, "tokenizer", error) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        # What transformers makes up for a folder that has the model only.
        raise _not_found(path, "tokenizer", FileNotFoundError("it has no vocabulary"))
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


def load_policy(
    config: Config, path: str | Path, *, vocab_size: int, world: World, is_trained: bool = True
) -> Policy:
    """The policy for the model at `path`, in this process or sharded over `world`. Collective.

    Args:
        is_trained: False: its weights are in the compute dtype, for forwards alone.
    Raises:
        ConfigError: see `load_model` and `Policy`.
    """
    options = {
        "temperature": config.rollout.temperature,
        "vocab_size": vocab_size,
        "autocast_dtype": resolve_autocast_dtype(config.model),
    }
    if world.mesh is None:
        model = load_model(config.model, path, seed=config.seed, is_trained=is_trained)
        policy = Policy(model, **options)
    else:
        policy = _sharded_policy(config, path, world, options, is_trained=is_trained)
    left = None if config.model.lora_rank is None else unadapted_weights(policy.model)
    if left and is_trained and world.is_main:
        print(f"no LoRA adapter, and so no training, for {left}", flush=True)
    return policy


def _sharded_policy(
    config: Config, path: str | Path, world: World, options: dict[str, Any], *, is_trained: bool
) -> Policy:
    device = resolve_device(config.model)
    offload = config.sharding.cpu_offload
    source: list[PreTrainedModel] = []  # one model on rank 0, empty elsewhere
    on_host = host_config(config.model, device)
    loading = {"seed": config.seed, "is_trained": is_trained}
    world.broadcast(lambda: source.append(load_model(on_host, path, **loading)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            **_architecture(config.model, path, is_trained=is_trained), trust_remote_code=False
        )
        _prepare(model, config.model, seed=config.seed)
    policy = Policy(model, device=device, **options)
    policy.shard(world.mesh, cpu_offload=offload)
    policy.to_empty(device="cpu" if offload else device)
    set_model_state_dict(
        model,
        source[0].state_dict() if source else {},
        options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload
        ),
    )
    buffers = world.broadcast(lambda: dict(source[0].named_buffers()))
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    model.generation_config = world.broadcast(lambda: source[0].generation_config)
    policy.check_forward()
    return policy


def load_model(
    config: ModelConfig, path: str | Path, *, seed: int = 0, is_trained: bool = True
) -> PreTrainedModel:
    """The causal language model at `path`, in training mode.

    Trained weights are float32 (or float64); weights frozen under adapters have the compute dtype.

    Args:
        seed: for initialising adapters.
        is_trained: False: all weights but those of adapters have the compute dtype.
    Raises:
        ConfigError: nothing at `path`, not a causal language model, missing weights, an override
            that does not apply to the model, or a missing package.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            trust_remote_code=False,
            **_architecture(config, path, is_trained=is_trained),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_found(path, "model", error) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(f"model.path: {path} lacks {len(missing)} weights, first {missing[0]}")
    for name, *shapes in sorted(loading["mismatched_keys"]):
        found, expected = map(list, shapes)
        raise ConfigError(
            f"model.path: {path} has {name} in shape {found}, its configuration needs {expected}; "
            "learned positions end where they were trained, whatever model.max_position_embeddings"
        )
    return _prepare(model.to(resolve_device(config)), config, seed=seed)


def load_model_config(config: ModelConfig, path: str | Path) -> PreTrainedConfig:
    """The configuration of the model at `path`, with the overrides of `config`.

    Raises:
        ConfigError: nothing at `path`, not a causal language model, or an override that does not
            apply to the model.
    """
    try:
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_found(path, "model", error) from error
    quantized = getattr(model_config, "quantization_config", None)
    if quantized is not None:
        options = quantized if isinstance(quantized, dict) else quantized.to_dict()
        raise ConfigError(
            f"model.path: expected weights that can be trained, {path} is quantized "
            f"({options.get('quant_method', 'by an unknown method')})"
        )
    _require_causal_lm(model_config, path)
    _override(model_config.get_text_config(), config)
    return model_config


def _architecture(config: ModelConfig, path: str | Path, *, is_trained: bool) -> dict[str, Any]:
    """The arguments that construct the model at `path`, apart from its weights."""
    dtype, _ = resolve_weight_dtypes(config)
    if not is_trained:
        dtype = resolve_autocast_dtype(config) or dtype
    return {
        "config": load_model_config(config, path),
        "dtype": dtype,
        "attn_implementation": _attention(config),
    }


def _prepare(model: PreTrainedModel, config: ModelConfig, *, seed: int) -> PreTrainedModel:
    if config.liger:
        _require_liger(resolve_device(config))
        _apply_liger(model)
    if config.lora_rank is not None:
        add_adapters(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dtype=resolve_weight_dtypes(config)[1],
            seed=seed,
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _attention(config: ModelConfig) -> str | None:
    """An implementation by its name in transformers; None: its default, `sdpa` where supported."""
    can_flash = (
        is_installed("flash_attn")
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


def _require_liger(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"model.liger: expected a CUDA device, got {device}")
    require_package("liger_kernel", "model.liger")


def _apply_liger(model: PreTrainedModel) -> None:
    """Apply all of Liger's kernels for the model except lm_head and loss, where we use our own."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"model.liger: liger-kernel does not support {type(model).__name__}")
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def _not_found(path: str | Path, what: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "custom code" in reason:
        return ConfigError(
            f"model.path: the {what} of {path} is code of its own (auto_map), which is never run: "
            "choose one that transformers has a class for"
        )
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
    """Write the overrides of `config` into a transformers configuration; turn off all dropout."""
    if config.rope_theta is not None:
        if "rope_theta" not in (getattr(text_config, "rope_parameters", None) or {}):
            raise ConfigError("model.rope_theta: the model has no single rope_theta to replace")
        text_config.rope_parameters["rope_theta"] = config.rope_theta
    if config.max_position_embeddings is not None:
        text_config.max_position_embeddings = config.max_position_embeddings
    for name, value in vars(text_config).items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(text_config, name, 0.0)  # log-probs of two forwards must agree


def try_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Write all that `export` writes but the weights, to a folder that is deleted again.

    Returns:
        a notice for the user, where something is carried over that transformers would refuse.
    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            _write_descriptions(model, model.dtype, tokenizer, Path(folder))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.path: expected a model that can be written again, but its configuration or "
            f"tokenizer cannot: {error}"
        ) from error
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        issues = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE) or [str(error)]
        return (
            f"{GENERATION_CONFIG_NAME} of the base is inconsistent ({', '.join(issues)}): the "
            "trained model gets it as it is"
        )
    return None


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    world: World | None = None,
) -> None:
    """Write both in Hugging Face format; `folder` is replaced atomically. Collective.

    Adapters are merged. Sharded or adapted weights are gathered bucket by bucket into the host
    memory of rank 0.
    """
    world = World() if world is None else world
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    weights = full_weights(model, dtype=dtype, bucket_bytes=_EXPORT_BUCKET_BYTES)
    state = {name: weight.cpu() for name, weight in weights if world.is_main}
    world.broadcast(lambda: _write(model, state, dtype, tokenizer, Path(folder)))


def _write(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _write_weights(model, state, partial)
        _write_descriptions(model, dtype, tokenizer, partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists() and replaced.exists():
            replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_weights(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    # transformers loads generation configs that it refuses to save: ours is written apart.
    ours, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = ours


def _write_descriptions(
    model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Everything but the weights."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # it was that of the frozen weights
    config.save_pretrained(folder)
    model.generation_config.to_json_file(
        folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"]
    )
    tokenizer.save_pretrained(folder)
