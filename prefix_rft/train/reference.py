"""The reference that a KL term compares the policy with: a model of its own, never trained.

It stays what the run starts from, or what `reference.model` names, or becomes the policy every n
steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import ConfigError, require
from prefix_rft.config import START, Config, model_at
from prefix_rft.model import (
    Policy,
    World,
    check_micro_batches,
    load_model_config,
    load_policy,
    load_tokenizer,
    without_adapters,
)
from prefix_rft.rollout import max_sequence_length

_KEY = "reference.model"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model to take log-probs of.

    Attributes:
        policy: its model; where `is_base`, the trained policy itself, the reference being what is
            left of it without its adapters.
        update_every: steps after which it becomes the policy; 0: never.
    """

    policy: Policy
    update_every: int = 0
    is_base: bool = False

    @contextmanager
    def at_work(self) -> Iterator[Policy]:
        """While entered, forwards of the policy that it gives are those of the reference."""
        with without_adapters(self.policy.model) if self.is_base else nullcontext():
            yield self.policy
        if isinstance(self.policy, FSDPModule):
            self.policy.reshard()  # the outermost part stays gathered else

    @torch.no_grad()
    def follow(self, policy: Policy, num_steps: int) -> None:
        """Become `policy` if `num_steps` steps done are the end of a period."""
        if not self.update_every or num_steps % self.update_every:
            return
        pairs = zip(self.policy.model.parameters(), policy.model.parameters(), strict=True)
        for ours, theirs in pairs:
            if theirs.requires_grad:
                ours.copy_(theirs)


def check_reference(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ConfigError where the reference cannot read what the policy writes.

    Its tokenizer may know more tokens than `tokenizer`, and must give the others the same ids.
    """
    if config.reference.model == START:
        return
    with _naming_the_reference():
        path = model_at(config.reference.model)
        known = load_tokenizer(path).get_vocab()
        text_config = load_model_config(config.model, path).get_text_config()
    limit, longest = (
        getattr(text_config, "max_position_embeddings", None),
        max_sequence_length(config),
    )
    require(limit is None or longest <= limit, _KEY, f"a model that takes {longest} tokens", limit)
    ours = tokenizer.get_vocab()
    different = sorted((i, token) for token, i in ours.items() if known.get(token) != i)
    if different:
        i, token = different[0]
        raise ConfigError(
            f"{_KEY}: expected a model with the tokens of the policy, got {path}, in which "
            f"{len(different)} of {len(ours)} differ, the first is {token!r}: {i} in the policy, "
            f"{known.get(token, 'unknown')} there"
        )


def load_reference(
    config: Config, start: Path | str, policy: Policy, *, vocab_size: int, world: World
) -> Reference:
    """The reference of a run of `policy`, loaded and sharded like it. Collective.

    Args:
        start: the model that the run starts from.
    Raises:
        ConfigError: `reference.model` cannot be loaded, or is to become a policy of other shapes.
    """
    update_every = config.reference.update_every
    is_start = config.reference.model == START
    if config.model.lora_rank is not None and not update_every:
        if is_start:
            return Reference(policy=policy, is_base=True)
        config = replace(config, model=replace(config.model, lora_rank=None))
    with nullcontext() if is_start else _naming_the_reference():
        path = start if is_start else model_at(config.reference.model)
        own = load_policy(config, path, vocab_size=vocab_size, world=world, is_trained=False)
        check_micro_batches(own.model, config.trainer.micro_batch_tokens)
    if update_every:
        shapes, theirs = _shapes(own), _shapes(policy)
        require(
            shapes == theirs,
            "reference.update_every",
            f"0, as {path} is another model",
            update_every,
        )
    return Reference(policy=own, update_every=update_every)


@contextmanager
def _naming_the_reference() -> Iterator[None]:
    """Errors of loading speak of `model.path`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{_KEY}: {str(error).removeprefix('model.path: ')}") from error


def _shapes(policy: Policy) -> list[tuple[str, torch.Size]]:
    return [(name, weight.shape) for name, weight in policy.model.named_parameters()]
