"""Requests for any rollout engine, and references for its completions."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from prefix_rft.data_types import Completion, Rollout, RolloutRequest, TrainBatch, TrainRow
from prefix_rft.model.policy import Policy
from prefix_rft.rollout.engine import RolloutEngine
from prefix_rft.train.packing import pack

VOCAB = 100  # of the tokenizer; the models have 112 columns


def make_requests(num: int, *, seed: int = 0) -> list[RolloutRequest]:
    """Prompts of 1 to 12 tokens, every third with a prefix of up to 20, budgets of 1 to 30."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(count))

    return [
        RolloutRequest(
            prompt_ids=ids(rng.randint(1, 12)),
            prefix_ids=ids(rng.randint(1, 20)) if i % 3 == 2 else (),
            max_new_tokens=rng.randint(1, 30),
        )
        for i in range(num)
    ]


def as_batch(
    requests: Sequence[RolloutRequest], completions: Sequence[Completion], *, dtype: torch.dtype
) -> TrainBatch:
    """The completions as the trainer packs them."""
    rows = [
        TrainRow.of_rollout(
            Rollout(
                prompt_ids=request.prompt_ids,
                response_ids=request.prefix_ids + completion.token_ids,
                prefix_length=len(request.prefix_ids),
                rollout_log_probs=completion.log_probs,
                finish_reason=completion.finish_reason,
                text="",
                reward=0.0,
                status="wrong",
            ),
            advantage=1.0,
            prefix_advantage=1.0,
        )
        for request, completion in zip(requests, completions, strict=True)
    ]
    return pack(rows, device=torch.device("cpu"), dtype=dtype)


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    weights_version: int = 0,
) -> list[Completion]:
    return engine.generate(
        requests, temperature=temperature, seed=seed, weights_version=weights_version
    )


def greedy_alone(
    model: PreTrainedModel, request: RolloutRequest, *, eos: Sequence[int] = (1,)
) -> tuple[int, ...]:
    """The completion from a loop of full forwards without a cache."""
    ids = list(request.prompt_ids + request.prefix_ids)
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < request.max_new_tokens:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCAB]
            ids.append(int(logits.argmax()))
            if ids[-1] in eos:
                break
    return tuple(ids[start:])


def log_prob_gap(
    policy: Policy,
    requests: Sequence[RolloutRequest],
    completions: Sequence[Completion],
    *,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The largest difference between the engine's log-probs and the trainer's, in nats."""
    batch = as_batch(requests, completions, dtype=dtype)
    continuation = batch.response_mask & ~batch.prefix_mask
    gap = policy.token_stats(batch).log_probs - batch.rollout_log_probs
    return gap[continuation].abs().max().item()
