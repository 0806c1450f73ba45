"""UFT: all rollouts of a group continue one hint, which gets shorter (arXiv 2505.16984)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
from pydantic import NonNegativeFloat

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest, TrainRow
from prefix_rft.methods.grpo import GRPO, GRPOOptions
from prefix_rft.methods.hint import HintOptions, hint_loss
from prefix_rft.methods.hint_figures import CHARTS, PROGRESS, hint_figures
from prefix_rft.methods.method import TokenLoss
from prefix_rft.methods.mixture import per_token


@config_section("uft")
class UFTConfig(HintOptions, GRPOOptions):
    """How long the hints are; the coefficients of the means over tokens."""

    nll_coef: NonNegativeFloat = 0.001  # of the negative log-likelihood, over the hints' tokens
    entropy_coef: NonNegativeFloat = 0.001  # of the entropy, over the tokens the policy wrote
    kl_coef: NonNegativeFloat = 0.001  # of the KL to the reference (k3), over the same tokens


class UFT(GRPO):
    """GRPO behind hints, their likelihood, an entropy bonus and a KL penalty."""

    name = "uft"
    section = UFTConfig
    charts, progress = CHARTS, PROGRESS
    figures = staticmethod(hint_figures)

    @property
    def uses_reference(self) -> bool:
        return self.config.kl_coef > 0

    def schedule(self, step: int) -> dict[str, float]:
        return {"hint/probability": self.config.probability(step, self.setting.num_steps)}

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        budget = self.setting.max_response_length
        hint = self.config.hint(
            problem,
            self.config.probability(step, self.setting.num_steps),
            np.random.default_rng([self.setting.seed, step, problem.index]),
            max_tokens=budget - 1,
        )
        request = RolloutRequest(
            prompt_ids=problem.prompt_ids, prefix_ids=hint, max_new_tokens=budget - len(hint)
        )
        return [request] * self.setting.group_size

    def rows(self, group: Group, step: int) -> Iterable[TrainRow]:
        every = self.config.entropy_coef > 0 or self.config.kl_coef > 0
        for rollout, advantage in self.with_advantages(group):
            if advantage or every or (rollout.is_hybrid and self.config.nll_coef > 0):
                yield TrainRow.of_rollout(rollout, advantage=advantage, prefix_advantage=0.0)

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        config = self.config
        function = partial(
            hint_loss,
            clip=config.clip,
            nll=per_token(mini_batch, config.nll_coef, "demonstration"),
            entropy_coef=config.entropy_coef,
            kl_coef=config.kl_coef,
        )
        inputs = ("old_log_probs", "advantages", "prefix_mask")
        return TokenLoss(function, (*inputs, "ref_log_probs") if self.uses_reference else inputs)
