"""SRFT: likelihoods of demonstrations and rollouts, weighed by entropy (arXiv 2506.19767).

In three forms: the paper's, its official code's, and that of Unify-Post-Training.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainBatch, TrainRow
from prefix_rft.methods.advantage import group_advantages, reward_scale
from prefix_rft.methods.luffy import LUFFY
from prefix_rft.methods.method import TokenLoss
from prefix_rft.methods.mixture import MixtureOptions, per_token
from prefix_rft.methods.srft_loss import row_means, srft_loss

if TYPE_CHECKING:
    import torch


@config_section("srft")
class SRFTConfig(MixtureOptions):
    """Whose form of the loss it is; its coefficients."""

    variant: Literal["paper", "official", "upt"] = "paper"  # the formula, or one of two codes
    # of the mean likelihood of demonstrations, times e^-H (official: e^+H)
    sft_coef: NonNegativeFloat = 0.5
    correct_coef: NonNegativeFloat = 0.1  # of the likelihood of correct rollouts, times e^+H
    # what H is the mean over; None: a token's own, with upt that of its row
    entropy_level: Literal["token", "row"] | None = None
    entropy_coef: NonNegativeFloat = 0.0  # coefficient of the mean entropy; upt's script: 0.001

    @property
    def by_row(self) -> bool:
        default = "row" if self.variant == "upt" else "token"
        return (self.entropy_level or default) == "row"


class SRFT(LUFFY):
    """G rollouts beside the graded demonstration; upt: G - 1, as it takes a rollout's place."""

    name = "srft"
    section = SRFTConfig

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        requests = super().plan_group(problem, step)
        is_one_more = problem.demonstration_ids and self.config.variant != "upt"
        return [requests[0], *requests] if is_one_more else requests

    def group_rows(self, group: Group) -> list[TrainRow]:
        """Rollouts with 1 or -1 for correct or wrong; the demonstration with its advantage."""
        rewards = [rollout.reward for rollout in group.rollouts]
        scale = 1.0 if self.config.variant == "upt" else reward_scale(rewards)
        advantages = group_advantages(rewards, [False] * len(rewards))
        return [
            TrainRow.of_rollout(
                rollout,
                advantage=1.0 if rollout.status == "correct" else -1.0,
                prefix_advantage=advantage.prefix / scale,
            )
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        ]

    def stats_rows(self, mini_batch: MiniBatch) -> list[int]:
        return list(range(len(mini_batch.rows))) if self.config.by_row else []

    def prepare(
        self, batch: TrainBatch, log_probs: torch.Tensor, entropy: torch.Tensor, step: int
    ) -> TrainBatch:
        return replace(batch, weights=row_means(batch, entropy)) if self.config.by_row else batch

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        config = self.config
        sft = config.converted(config.sft_coef, of_demonstrations=True)
        entropy = config.converted(config.entropy_coef)
        function = partial(
            srft_loss,
            sft=per_token(mini_batch, sft, "demonstration"),
            sign=1.0 if config.variant == "official" else -1.0,
            shaped=config.variant != "paper",
            correct_coef=config.correct_coef,
            by_row=config.by_row,
            entropy_coef=per_token(mini_batch, entropy, "policy", "demonstration"),
        )
        return TokenLoss(function, ("advantages", "weights", "prefix_mask"))
