"""What methods share that mix GRPO with likelihoods: advantages over the standard deviation, a
clip, and a mean over tokens (arXiv 2402.03300, with the token mean of arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch, Rollout, TrainRow
from prefix_rft.methods.advantage import group_advantages, reward_scale
from prefix_rft.methods.mixture import bounded_ratio
from prefix_rft.methods.rft import RFT

if TYPE_CHECKING:
    import torch


@config_section("grpo")
class GRPOOptions:
    """The fields that the sections of such methods begin with."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2  # ratios are clipped at 1 - clip and 1 + clip


class GRPO(RFT):
    """Every token that the policy wrote counts alike, wherever its rollout ended."""

    section = GRPOOptions
    needs_demonstrations = True
    scales_advantages = False
    uses_reference = False  # the section [loss] is not its own

    def rows(self, group: Group, step: int) -> Iterable[TrainRow]:
        """What a group teaches."""
        raise NotImplementedError

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        """`prompts_per_update` groups each; the mean is over all tokens that the policy wrote,
        also where a rollout without any gradient is left out.
        """
        size = self.setting.prompts_per_update
        mini_batches = [
            MiniBatch(
                rows=[row for group in part for row in self.rows(group, step)],
                normalizer=max(1, sum(self._num_tokens(group) for group in part)),
            )
            for part in (groups[start : start + size] for start in range(0, len(groups), size))
        ]
        return [mini_batch for mini_batch in mini_batches if mini_batch.rows]

    def with_advantages(self, group: Group) -> Iterator[tuple[Rollout, float]]:
        """The rollouts to learn from: A = (R - mean of the group) / (std + 1e-6)."""
        rewards = [rollout.reward for rollout in group.rollouts]
        scale = reward_scale(rewards)
        advantages = group_advantages(rewards, [False] * len(rewards))
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            if not self.setting.masks(rollout):
                yield rollout, advantage.continuation / scale

    def _num_tokens(self, group: Group) -> int:
        return sum(
            len(rollout.response_ids) - rollout.prefix_length
            for rollout in group.rollouts
            if not self.setting.masks(rollout)
        )


def clipped_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """max(-A r, -A clip(r)); where A < 0 at most -A `dual_clip`."""
    ratio = bounded_ratio(log_probs, old_log_probs)
    losses = (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is None:
        return losses
    return losses.minimum(advantages.abs() * dual_clip).where(advantages < 0, losses)
