"""Prefix-RFT: some rollouts of a group start inside the demonstration (arXiv 2507.01679)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from prefix_rft.checks import config_section, require
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainBatch
from prefix_rft.methods.advantage import Advantage, group_advantages
from prefix_rft.methods.prefix import PrefixOptions
from prefix_rft.methods.prefix_figures import CHARTS, PROGRESS, prefix_figures
from prefix_rft.methods.rft import RFT
from prefix_rft.methods.selection import SelectionOptions

if TYPE_CHECKING:
    import torch


@config_section("prefix_rft")
class PrefixRFTConfig(SelectionOptions, PrefixOptions):
    """Hybrid rollouts, their advantages, and which of their prefix tokens are trained on."""

    advantage: Literal["joint", "exclude_hybrid"] = "joint"  # rollouts that set the baseline
    drop_negative_prefix_advantage: bool = False  # prefix tokens count only where it is positive


class PrefixRFT(RFT):
    """Dr. GRPO with hybrid rollouts; of their prefix tokens the most uncertain get gradient."""

    name = "prefix_rft"
    section = PrefixRFTConfig
    charts, progress = CHARTS, PROGRESS
    figures = staticmethod(prefix_figures)

    @classmethod
    def check(cls, config: PrefixRFTConfig, *, group_size: int, max_response_length: int) -> None:
        # Ordinary rollouts are needed where they set the baseline, or have to fail first.
        needs_ordinary = config.advantage == "exclude_hybrid" or config.when == "group_fails"
        for name, limit, bound in (
            ("num_hybrid", "rollout.group_size", group_size - needs_ordinary),
            ("min_prefix_tokens", "rollout.max_response_length", max_response_length - 1),
        ):
            value, expected = getattr(config, name), f"at most {bound}, given {limit}"
            require(value <= bound, f"{cls.name}.{name}", expected, value)

    def schedule(self, step: int) -> dict[str, float]:
        low, high = self.config.window(step, self.setting.num_steps)
        return {"prefix/low": low, "prefix/high": high}

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        requests = super().plan_group(problem, step)
        if not problem.demonstration_ids:
            return requests
        ordinary = requests[self.config.num_hybrid :]
        waits = self.config.when == "group_fails"
        return ordinary if waits else ordinary + self._hybrids(problem, step)

    def plan_rest(self, group: Group, step: int) -> list[RolloutRequest]:
        problem = group.problem
        if self.config.when == "always" or not problem.demonstration_ids:
            return []
        if any(rollout.status == "correct" for rollout in group.rollouts):
            return super().plan_group(problem, step)[: self.config.num_hybrid]
        return self._hybrids(problem, step)

    def _hybrids(self, problem: Problem, step: int) -> list[RolloutRequest]:
        rng = np.random.default_rng([self.setting.seed, step, problem.index])
        window = self.config.window(step, self.setting.num_steps)
        return self.config.requests(problem, window, rng, self.setting.max_response_length)

    def advantages(self, group: Group) -> list[Advantage]:
        return group_advantages(
            [rollout.reward for rollout in group.rollouts],
            [rollout.is_hybrid for rollout in group.rollouts],
            baseline=self.config.advantage,
            drop_negative_prefix=self.config.drop_negative_prefix_advantage,
        )

    def stats_rows(self, mini_batch: MiniBatch) -> list[int]:
        return self.config.selects_from(mini_batch)

    def prepare(
        self, batch: TrainBatch, log_probs: torch.Tensor, entropy: torch.Tensor, step: int
    ) -> TrainBatch:
        return self.config.select(batch, entropy, seed=step)
