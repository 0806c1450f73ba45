"""RL with SFT loss: policy gradient on rollouts plus the likelihood of the demonstration.

A baseline of LUFFY (arXiv 2504.14945) and of Prefix-RFT, as LUFFY's code computes it: no clip, and
the baseline of the advantages from the rollouts alone.
"""

from __future__ import annotations

from pydantic import NonNegativeFloat

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainRow
from prefix_rft.methods.demonstration import demonstration_row
from prefix_rft.methods.method import TokenLoss
from prefix_rft.methods.mixture import Mixture, MixtureOptions


@config_section("rl_sft_loss")
class RLSFTLossConfig(MixtureOptions):
    """The weight of the demonstrations; a problem without one has a rollout more."""

    sft_coef: NonNegativeFloat = 1.0  # coefficient of the mean negative log-likelihood


class RLSFTLoss(Mixture):
    """G - 1 rollouts, and the demonstration in the place of the last one."""

    name = "rl_sft_loss"
    section = RLSFTLossConfig

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        requests = super().plan_group(problem, step)
        return requests[:-1] if problem.demonstration_ids else requests

    def group_rows(self, group: Group) -> list[TrainRow]:
        rows = self.policy_rows(group.rollouts)
        if group.problem.demonstration_ids:
            rows.append(demonstration_row(group.problem, self.setting.eos_token_id))
        return rows

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        return self.token_loss(mini_batch, sft_coef=self.config.sft_coef)
