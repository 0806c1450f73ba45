"""The engine that a configuration selects."""

from functools import partial

from transformers import PreTrainedTokenizerBase

from prefix_rft.config import Config
from prefix_rft.model import Policy, eos_token_ids, resolve_autocast_dtype
from prefix_rft.rollout.engine import RolloutEngine
from prefix_rft.rollout.server_token import read_token
from prefix_rft.rollout.vllm_options import import_vllm


def make_engine(
    config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """The engine named by `rollout.engine`, for the model of `policy`. Collective.

    Raises:
        ConfigError: the engine is not installed, or cannot run the model with these settings.
    """
    model = policy.model
    shared = {
        "vocab_size": len(tokenizer),
        "eos_token_ids": eos_token_ids(model, tokenizer),
        "max_batch_sequences": config.rollout.max_batch_sequences,
    }
    if config.rollout.engine != "transformers":
        import_vllm()  # also brings the HTTP client of the server engine
        if config.rollout.engine == "vllm":
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


def max_sequence_length(config: Config) -> int:
    """The most tokens of prompt and response together, in training or evaluation."""
    responses = (config.rollout.max_response_length, config.eval.max_response_length or 0)
    return config.data.max_prompt_tokens + max(responses)
