"""HPT: a problem is learnt from its demonstration where rollouts fail, else from the rollouts.

Source: arXiv 2509.04419 and its code, Unify-Post-Training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from prefix_rft.checks import config_section, require
from prefix_rft.data_types import Group, MiniBatch, TrainRow
from prefix_rft.methods.demonstration import calls_for_demonstration, demonstration_row
from prefix_rft.methods.method import Chart, Figure, TokenLoss
from prefix_rft.methods.mixture import Mixture, MixtureOptions


@config_section("hpt")
class HPTConfig(MixtureOptions):
    """When the demonstration takes the place of all rollouts, and its weight."""

    # most correct rollouts of a group that its demonstration replaces; published: 0, LLaMA 2
    gate: NonNegativeInt = 0
    # coefficient of the mean negative log-likelihood; published: 1.0, 0.3 for the 1.5B model
    sft_coef: NonNegativeFloat = 1.0
    # updates whose gradient is longer are skipped, in `units`; None: none is
    skip_norm: PositiveFloat | None = 80.0


class HPT(Mixture):
    """G rollouts a problem, or, where at most `gate` of them are correct, one demonstration."""

    name = "hpt"
    section = HPTConfig
    charts = (
        *Mixture.charts,
        Chart(title="Groups replaced", series={"hpt/replaced_frac": "by a demonstration"}),
    )

    @classmethod
    def check(cls, config: HPTConfig, *, group_size: int, max_response_length: int) -> None:
        bound = f"below rollout.group_size ({group_size})"
        require(config.gate < group_size, "hpt.gate", bound, config.gate)

    def is_replaced(self, group: Group) -> bool:
        return calls_for_demonstration(group, gate=self.config.gate)

    def group_rows(self, group: Group) -> list[TrainRow]:
        if self.is_replaced(group):
            return [demonstration_row(group.problem, self.setting.eos_token_id)]
        return self.policy_rows(group.rollouts)

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        return [
            replace(mini_batch, largest_norm=self.largest_norm)
            for mini_batch in super().mini_batches(groups, step)
        ]

    @property
    def largest_norm(self) -> float:
        """The published code's gradient is that of a sum over the rows of a rank."""
        if self.config.skip_norm is None:
            return math.inf
        is_sum = self.config.units == "published_code"
        return self.config.skip_norm / (self.config.published_rows if is_sum else 1)

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        return self.token_loss(mini_batch, sft_coef=self.config.sft_coef)

    def figures(self, groups: Sequence[Group], *rest: Any) -> Iterator[Figure]:
        yield from super().figures(groups, *rest)
        for group in groups:
            yield Figure("hpt/replaced_frac", self.is_replaced(group), 1)
