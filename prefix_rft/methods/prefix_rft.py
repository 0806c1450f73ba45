"""Prefix-RFT: some rollouts of a group start inside the demonstration (arXiv 2507.01679)."""

from __future__ import annotations

import fractions
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from prefix_rft.checks import Fraction, config_section, require
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainBatch
from prefix_rft.methods.advantage import Advantage, group_advantages
from prefix_rft.methods.prefix import PrefixOptions
from prefix_rft.methods.prefix_figures import CHARTS, PROGRESS, prefix_figures
from prefix_rft.methods.rft import RFT

if TYPE_CHECKING:
    import torch


@config_section("prefix_rft")
class PrefixRFTConfig(PrefixOptions):
    """Hybrid rollouts, their advantages, and which of their prefix tokens are trained on."""

    advantage: Literal["joint", "exclude_hybrid"] = "joint"  # rollouts that set the baseline
    drop_negative_prefix_advantage: bool = False  # prefix tokens count only where it is positive
    selection_fraction: Fraction = 0.2  # fraction of the prefix tokens that are trained on
    selection_scope: Literal["minibatch", "sequence"] = "minibatch"  # pool to select from
    selection_order: Literal["high", "low", "random"] = "high"  # entropy of those selected


class PrefixRFT(RFT):
    """Dr. GRPO with hybrid rollouts; of their prefix tokens the most uncertain get gradient."""

    name = "prefix_rft"
    section = PrefixRFTConfig
    charts, progress = CHARTS, PROGRESS
    figures = staticmethod(prefix_figures)

    @classmethod
    def check(cls, config: PrefixRFTConfig, *, group_size: int, max_response_length: int) -> None:
        for name, limit, bound in (
            ("num_hybrid", "rollout.group_size", group_size),
            ("min_prefix_tokens", "rollout.max_response_length", max_response_length),
        ):
            value = getattr(config, name)
            require(value < bound, f"{cls.name}.{name}", f"below {limit} ({bound})", value)

    def schedule(self, step: int) -> dict[str, float]:
        low, high = self.config.window(step, self.setting.num_steps)
        return {"prefix/low": low, "prefix/high": high}

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        requests = super().plan_group(problem, step)
        if not problem.demonstration_ids:
            return requests
        rng = np.random.default_rng([self.setting.seed, step, problem.index])
        window = self.config.window(step, self.setting.num_steps)
        for k in range(self.config.num_hybrid):
            ratio = rng.uniform(*window)
            requests[-1 - k] = self.config.request(problem, ratio, self.setting.max_response_length)
        return requests

    def advantages(self, group: Group) -> list[Advantage]:
        return group_advantages(
            [rollout.reward for rollout in group.rollouts],
            [rollout.is_hybrid for rollout in group.rollouts],
            baseline=self.config.advantage,
            drop_negative_prefix=self.config.drop_negative_prefix_advantage,
        )

    def stats_rows(self, mini_batch: MiniBatch) -> list[int]:
        return [i for i, row in enumerate(mini_batch.rows) if row.origin.is_hybrid]

    def prepare(
        self, batch: TrainBatch, log_probs: torch.Tensor, entropy: torch.Tensor, step: int
    ) -> TrainBatch:
        """Keeps the `selection_fraction` of the prefix tokens of rows with an advantage."""
        from rft_kernels import select_top_entropy

        selected = select_top_entropy(
            entropy,
            batch.prefix_mask & batch.has_advantage,
            fraction=fractions.Fraction(str(self.config.selection_fraction)),
            cu_seqlens=batch.cu_seqlens if self.config.selection_scope == "sequence" else None,
            order=self.config.selection_order,
            seed=step,
        )
        return replace(batch, selected_mask=selected)
