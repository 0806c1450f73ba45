"""The engine that a configuration selects."""

from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import require
from prefix_rft.config import Config, DataConfig, RolloutConfig
from prefix_rft.model import Policy, resolve_autocast_dtype, stop_token_ids, vocabulary_size
from prefix_rft.rollout.engine import RolloutEngine
from prefix_rft.rollout.server_token import read_token
from prefix_rft.rollout.stop_text import StopText
from prefix_rft.rollout.vllm_options import import_vllm


def make_engine(
    config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """The engine named by `rollout.engine`, for the model of `policy`. Collective.

    Raises:
        ConfigError: the engine is not installed, or cannot run the model with these settings.
    """
    model, rollout = policy.model, config.rollout
    vocab_size = vocabulary_size(tokenizer)
    for token_id in rollout.stop_token_ids:
        require(
            token_id < vocab_size, "rollout.stop_token_ids", f"ids below {vocab_size}", token_id
        )
    shared = {
        "vocab_size": vocab_size,
        "eos_token_ids": stop_token_ids(tokenizer, model.generation_config, rollout.stop_token_ids),
        "stop_text": StopText(tokenizer, rollout.stop) if rollout.stop else None,
        "max_batch_sequences": rollout.max_batch_sequences,
    }
    if rollout.engine != "transformers":
        import_vllm()  # also brings the HTTP client of the server engine
        if rollout.engine == "vllm":
            from prefix_rft.rollout.vllm_engine import VLLMEngine as Engine
        else:
            from prefix_rft.rollout.vllm_server import VLLMServerEngine

            Engine = partial(VLLMServerEngine, token=read_token(config))
        return Engine(
            model,
            config=config.vllm,
            device=policy.device,
            max_length=max_sequence_length(config),
            autocast_dtype=resolve_autocast_dtype(config.model),
            **shared,
        )
    from prefix_rft.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        model,
        pad_token_id=tokenizer.pad_token_id,
        autocast_dtype=policy.autocast_dtype,
        **shared,
    )


def fit_lengths(config: Config, limit: int | None) -> Config:
    """`config` with its default lengths cut to `limit` tokens of prompt and response together.

    A length that is not the default has been asked for, and stays.
    """
    if limit is None or max_sequence_length(config) <= limit:
        return config
    data, rollout = config.data, config.rollout
    prompt, response = data.max_prompt_tokens, rollout.max_response_length
    can_cut_response = response == RolloutConfig().max_response_length
    asked = [0 if can_cut_response else response, config.eval.max_response_length or 0]
    if prompt == DataConfig().max_prompt_tokens:
        prompt = max(1, min(prompt, limit - (max(asked) or limit * 3 // 4)))
    if can_cut_response:
        response = max(2, min(response, limit - prompt))
    return replace(
        config,
        data=replace(data, max_prompt_tokens=prompt),
        rollout=replace(rollout, max_response_length=response),
    )


def max_sequence_length(config: Config) -> int:
    """The most tokens of prompt and response together, in training or evaluation."""
    responses = (config.rollout.max_response_length, config.eval.max_response_length or 0)
    return config.data.max_prompt_tokens + max(responses)
