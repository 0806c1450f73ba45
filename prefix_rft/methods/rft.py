"""RFT: Dr. GRPO on ordinary rollouts (arXiv 2503.20783)."""

from dataclasses import asdict, dataclass

import torch
from rft_kernels import PolicyConfig, PolicyLoss

from prefix_rft.config import Config
from prefix_rft.data_types import Group, Problem, RolloutRequest, TrainBatch, TrainRow
from prefix_rft.methods.advantage import group_advantages
from prefix_rft.model import Policy


@dataclass(frozen=True)
class RFT:
    """What a method decides: requests, advantages, which prefix tokens count, the loss."""

    config: Config

    def schedule(self, step: int) -> dict[str, float]:
        """What changes with the step, as metrics."""
        return {}

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        """The `group_size` rollouts asked for; a pure function of config, problem and step."""
        budget = self.config.rollout.max_response_length
        request = RolloutRequest(prompt_ids=problem.prompt_ids, max_new_tokens=budget)
        return [request] * self.config.rollout.group_size

    def train_rows(self, group: Group) -> list[TrainRow]:
        """The rollouts that have a gradient; those with zero advantage are left out."""
        rollouts = group.rollouts
        advantages = group_advantages(
            [rollout.reward for rollout in rollouts],
            [rollout.is_hybrid for rollout in rollouts],
            baseline=self.config.method.advantage,
            drop_negative_prefix=self.config.method.drop_negative_prefix_advantage,
        )
        return [
            TrainRow(rollout=rollout, advantage=a.continuation, prefix_advantage=a.prefix)
            for rollout, a in zip(rollouts, advantages, strict=True)
            if a.continuation or (a.prefix and rollout.is_hybrid)
        ]

    def select(self, entropy: torch.Tensor, batch: TrainBatch, seed: int) -> torch.Tensor:
        """Prefix tokens that get gradient, [T] bool; here there is no prefix."""
        return torch.zeros_like(batch.prefix_mask)

    def loss(self, policy: Policy, batch: TrainBatch, normalizer: float) -> PolicyLoss:
        """The clipped objective: sum over the batch's loss tokens / `normalizer`."""
        return policy.policy_loss(
            batch, normalizer=normalizer, config=PolicyConfig(**asdict(self.config.loss))
        )
