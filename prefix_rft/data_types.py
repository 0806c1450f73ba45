"""What flows through one training step, in order.

Problem -> RolloutRequest -> Completion -> Rollout -> Group -> MiniBatch -> TrainBatch -> Update.

Token ids are plain tuples until `TrainBatch`, the first thing that lives in tensors.
Shape letters: T tokens of all rows laid end to end, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
RewardStatus = Literal["correct", "wrong", "no_answer", "timeout", "error", "no_reward"]
Source = Literal["policy", "demonstration"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One row of a dataset, tokenised.

    Without a demonstration (`demonstration_ids` empty) every rollout of the problem is on-policy.
    """

    index: int  # row in the source dataset
    prompt: str  # the rendered chat template
    prompt_ids: tuple[int, ...]
    answer: str  # gold answer, as the grader gets it
    demonstration: str | None = None
    demonstration_ids: tuple[int, ...] = ()  # without end-of-sequence token
    columns: Mapping[str, Any] = field(default_factory=dict)  # the source row, for user rewards


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One sequence to generate: the engine continues `prompt_ids + prefix_ids`."""

    prompt_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()  # forced start of the response
    max_new_tokens: int  # budget of the continuation; 0: graded as it is, nothing is generated


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine returns for one request, a sampled end-of-sequence token included."""

    token_ids: tuple[int, ...]  # the continuation only
    # One per token, of softmax(logits / temperature).
    log_probs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A scored response: `prefix_length` tokens of the demonstration, then the policy's own."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # prefix + continuation
    prefix_length: int
    rollout_log_probs: tuple[float, ...]  # by the engine, for the continuation
    finish_reason: FinishReason
    text: str  # decoded response
    reward: float
    status: RewardStatus
    # what the reward was made of, by name; empty where there is nothing to tell apart
    reward_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_hybrid(self) -> bool:
        return self.prefix_length > 0

    @property
    def is_sampled(self) -> bool:
        """Whether the policy wrote any of it; a whole demonstration is graded as it stands."""
        return self.prefix_length < len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All rollouts of one problem in one step."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring tokens of a response that come from one source and are weighed alike."""

    token_ids: tuple[int, ...]
    source: Source
    advantage: float = 0.0
    weight: float = 1.0  # for the losses that take one
    rollout_log_probs: tuple[float, ...] = ()  # by the engine, of tokens that the policy sampled


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """A prompt and a response to learn from."""

    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    origin: Rollout | Problem  # a problem where the response is its demonstration

    @classmethod
    def of_rollout(
        cls, rollout: Rollout, *, advantage: float, prefix_advantage: float, weight: float = 1.0
    ) -> TrainRow:
        """A rollout with its advantages, on prefix and continuation apart, and one weight."""
        length = rollout.prefix_length
        prefix = Segment(
            token_ids=rollout.response_ids[:length],
            source="demonstration",
            advantage=prefix_advantage,
            weight=weight,
        )
        continuation = Segment(
            token_ids=rollout.response_ids[length:],
            source="policy",
            advantage=advantage,
            weight=weight,
            rollout_log_probs=rollout.rollout_log_probs,
        )
        segments = (prefix, continuation)
        return cls(prompt_ids=rollout.prompt_ids, segments=segments, origin=rollout)

    @property
    def response_ids(self) -> tuple[int, ...]:
        return tuple(token for segment in self.segments for token in segment.token_ids)


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """What one optimizer update learns from."""

    rows: list[TrainRow]  # those with a gradient
    normalizer: float  # the sum of the tokens' losses is divided by it
    optimizer: str = "policy"  # name of the optimizer that takes the step
    largest_norm: float = math.inf  # an update whose gradient is longer is skipped

    @property
    def num_sampled(self) -> int:
        """Rows of which the policy sampled some tokens."""
        return sum(any(each.rollout_log_probs for each in row.segments) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Rows laid end to end, without the last token of each, which predicts nothing.

    Position t predicts `targets[t]`; masks and per-token values stand at the predicting position.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, restarts at 0 for every row
    targets: torch.Tensor  # [T] int64, the next token; -100 where it is no response token
    cu_seqlens: torch.Tensor  # [B + 1] int32, row b is [cu_seqlens[b], cu_seqlens[b + 1])
    lengths: tuple[int, ...]  # B row lengths, on the host
    response_mask: torch.Tensor  # [T] bool, the target is a token of the response
    prefix_mask: torch.Tensor  # [T] bool, the target is from a demonstration
    advantages: torch.Tensor  # [T] float
    weights: torch.Tensor  # [T] float
    rollout_log_probs: torch.Tensor  # [T] float, 0 on tokens from a demonstration
    old_log_probs: torch.Tensor | None = None  # [T] float; None: on-policy, the ratio is 1
    ref_log_probs: torch.Tensor | None = None  # [T] float, of the reference, where it is asked for
    # [T] bool, the tokens of demonstrations that get gradient; None: all of them
    selected_mask: torch.Tensor | None = None
    active_rows: torch.Tensor | None = None  # [N] int64, positions outside which there is none

    @property
    def has_advantage(self) -> torch.Tensor:
        """[T] bool, some token of the same row has an advantage."""
        seen = (self.advantages != 0).cumsum(0)[
            self.cu_seqlens[1:].long() - 1
        ]  # [B] up to each end
        in_row = seen.diff(prepend=seen.new_zeros(1)) > 0
        lengths = self.cu_seqlens.diff()
        return in_row.repeat_interleave(lengths, output_size=len(self.advantages))

    @property
    def loss_mask(self) -> torch.Tensor:
        """[T] bool, the tokens that have a loss."""
        if self.selected_mask is None:
            return self.response_mask
        return self.response_mask & (~self.prefix_mask | self.selected_mask)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update saw, per token of its batch."""

    rows: list[TrainRow]
    batch: TrainBatch  # with the selection
    log_probs: torch.Tensor  # [T], before the update; 0 where a token had no gradient
    entropy: torch.Tensor  # [T] nats, likewise, but known too where the method asked beforehand
    loss: torch.Tensor  # scalar
    sums: dict[str, torch.Tensor]  # the loss's metrics
    gap: torch.Tensor  # [N] nats, see `log_prob_gap`; empty where the policy had moved unseen
    grad_norm: float  # before clipping
    is_applied: bool  # False: the gradient was not finite, or too long, and the update skipped
