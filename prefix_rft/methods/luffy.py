"""LUFFY: the demonstration is one more rollout of the group (arXiv 2504.14945).

It is graded like the others and shares their baseline. Its tokens are no samples of the policy:
the ratio there is p / 1, the demonstrator's probability taken as 1, shaped to p / (p + gamma).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat

from prefix_rft.checks import Fraction, config_section
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainRow
from prefix_rft.methods.demonstration import whole_demonstration
from prefix_rft.methods.method import Chart, Figure, TokenLoss
from prefix_rft.methods.mixture import Mixture, MixtureOptions, bounded_ratio, per_token

if TYPE_CHECKING:
    import torch


@config_section("luffy")
class LUFFYConfig(MixtureOptions):
    """How demonstrations are weighed; the published entropy_coef is 0.001, the paper's 0.01."""

    gamma: PositiveFloat = 0.1  # f(p) = p / (p + gamma) of a demonstration's token
    # ratios of rollouts are clipped at 1 - clip and 1 + clip (the paper); None: not (its script)
    clip: Fraction | None = None


class LUFFY(Mixture):
    """G - 1 rollouts and the demonstration, graded, in one group."""

    name = "luffy"
    section = LUFFYConfig
    charts = (
        *Mixture.charts,
        Chart(title="Rewards", series={"reward/demonstration_mean": "demonstrations"}),
    )

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        requests = super().plan_group(problem, step)
        if problem.demonstration_ids:
            whole = whole_demonstration(problem, self.setting.eos_token_id)
            requests[-1] = RolloutRequest(
                prompt_ids=problem.prompt_ids, prefix_ids=whole, max_new_tokens=0
            )
        return requests

    def group_rows(self, group: Group) -> list[TrainRow]:
        return self.policy_rows(group.rollouts, learns_prefix=True)

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        entropy = self.config.converted(self.config.entropy_coef)
        function = partial(
            luffy_loss,
            gamma=self.config.gamma,
            clip=self.config.clip,
            entropy_coef=per_token(mini_batch, entropy, "policy", "demonstration"),
        )
        return TokenLoss(function, ("old_log_probs", "advantages", "prefix_mask"))

    def figures(self, groups: Sequence[Group], *rest: Any) -> Iterator[Figure]:
        yield from super().figures(groups, *rest)
        for rollout in (each for group in groups for each in group.rollouts):
            if not rollout.is_sampled:
                yield Figure("reward/demonstration_mean", rollout.reward, 1)


def luffy_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    is_demonstration: torch.Tensor,
    *,
    gamma: float,
    clip: float | None,
    entropy_coef: float,
) -> torch.Tensor:
    ratio = bounded_ratio(log_probs, old_log_probs)
    loss = -advantages * ratio
    if clip is not None:
        loss = loss.maximum(-advantages * ratio.clamp(1 - clip, 1 + clip))
    shaped = (log_probs - math.log(gamma)).sigmoid()  # p / (p + gamma)
    return loss.where(~is_demonstration, -advantages * shaped) - entropy_coef * entropy
