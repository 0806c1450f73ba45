"""RFT: Dr. GRPO on on-policy rollouts (arXiv 2503.20783)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainRow
from prefix_rft.methods.advantage import Advantage, group_advantages, reward_scale
from prefix_rft.methods.method import Method

if TYPE_CHECKING:
    from rft_kernels import PolicyConfig


class RFT(Method):
    """A group of rollouts of one prompt; each is better or worse than their mean."""

    name = "rft"
    scales_advantages = True

    @property
    def uses_reference(self) -> bool:
        return self.setting.loss.uses_kl

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        budget = self.setting.max_response_length
        request = RolloutRequest(prompt_ids=problem.prompt_ids, max_new_tokens=budget)
        return [request] * self.setting.group_size

    def advantages(self, group: Group) -> list[Advantage]:
        rewards = [rollout.reward for rollout in group.rollouts]
        return group_advantages(rewards, [False] * len(rewards))

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        """`prompts_per_update` groups each; one in which nothing has a gradient is left out."""
        size = self.setting.prompts_per_update
        rows = [
            self._rows(group, advantages)
            for group, advantages in zip(groups, self._scaled_advantages(groups), strict=True)
        ]
        mini_batches = [
            MiniBatch(
                rows=[row for part in rows[start : start + size] for row in part],
                # Of all rollouts, also those without an advantage.
                normalizer=sum(len(group.rollouts) for group in groups[start : start + size])
                * self.setting.max_response_length,
            )
            for start in range(0, len(groups), size)
        ]
        return [mini_batch for mini_batch in mini_batches if mini_batch.rows]

    def _scaled_advantages(self, groups: Sequence[Group]) -> list[list[Advantage]]:
        rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
        match self.setting.advantage_scale:
            case "none":
                scales = [1.0] * len(groups)
            case "std":
                scales = map(reward_scale, rewards)
            case "batch_std":
                scales = [reward_scale([x for group in rewards for x in group])] * len(groups)
        return [
            [advantage.over(scale) for advantage in self.advantages(group)]
            for group, scale in zip(groups, scales, strict=True)
        ]

    def _rows(self, group: Group, advantages: Sequence[Advantage]) -> list[TrainRow]:
        """Rollouts with an advantage; all of them where the loss has another term."""
        every = self.setting.loss.entropy_coef != 0 or self.setting.loss.uses_kl
        return [
            TrainRow.of_rollout(
                rollout,
                advantage=advantage.continuation,
                prefix_advantage=advantage.prefix,
            )
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
            if (every or advantage.continuation or (advantage.prefix and rollout.is_hybrid))
            and not self.setting.masks(rollout)
        ]

    def loss(self, mini_batch: MiniBatch) -> PolicyConfig:
        return self.setting.loss.policy_config()
