"""CHORD: (1 - mu) GRPO + mu SFT: mu falls, or each token has a weight (arXiv 2508.11408)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from prefix_rft.checks import Fraction, config_section
from prefix_rft.data_types import Group, MiniBatch, TrainRow
from prefix_rft.methods.demonstration import demonstration_row
from prefix_rft.methods.grpo import GRPO, GRPOOptions, clipped_loss
from prefix_rft.methods.method import Chart, TokenLoss
from prefix_rft.methods.mixture import Mixture, per_token

if TYPE_CHECKING:
    import torch


@config_section("chord")
class CHORDConfig(GRPOOptions):
    """The share of the demonstrations in the loss, over the steps and over tokens."""

    # mu: its cosine from `high` to `low`; phi: `phi_mu`, and likelihoods weighed by p (1 - p)
    variant: Literal["mu", "phi"] = "mu"
    high: Fraction = 0.9  # share of the demonstrations at the start
    low: Fraction = 0.05  # share of the demonstrations from the horizon on
    horizon_steps: PositiveInt | None = None  # steps of the cosine; None: 0.4 of the run's
    phi_mu: Fraction = 0.1  # share of the demonstrations, all along, of the variant phi
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0  # largest ratio where A < 0; None: any

    def mu(self, step: int, num_steps: int) -> float:
        if self.variant == "phi":
            return self.phi_mu
        progress = min(step / (self.horizon_steps or 0.4 * num_steps), 1.0)
        return self.low + 0.5 * (self.high - self.low) * (1 + math.cos(math.pi * progress))


class CHORD(GRPO):
    """G rollouts a problem, and beside them its demonstration."""

    name = "chord"
    section = CHORDConfig
    charts = (*Mixture.charts, Chart(title="Share of demonstrations", series={"chord/mu": "mu"}))
    progress, figures = Mixture.progress, Mixture.figures

    def schedule(self, step: int) -> dict[str, float]:
        return {"chord/mu": self.config.mu(step, self.setting.num_steps)}

    def rows(self, group: Group, step: int) -> Iterator[TrainRow]:
        mu = self.config.mu(step, self.setting.num_steps)
        for rollout, a in self.with_advantages(group):
            if a and mu < 1:
                yield TrainRow.of_rollout(rollout, advantage=a, prefix_advantage=0.0, weight=1 - mu)
        if group.problem.demonstration_ids and mu > 0:
            yield demonstration_row(group.problem, self.setting.eos_token_id, weight=mu)

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        function = partial(
            chord_loss,
            clip=self.config.clip,
            dual_clip=self.config.dual_clip,
            sft=per_token(mini_batch, 1.0, "demonstration"),
            phi=self.config.variant == "phi",
        )
        return TokenLoss(function, ("old_log_probs", "advantages", "weights", "prefix_mask"))


def chord_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    is_demonstration: torch.Tensor,
    *,
    sft: float,
    phi: bool,
    **clips: float | None,
) -> torch.Tensor:
    """-log_probs on demonstrations, the clipped objective on rollouts, weighed by their shares."""
    policy = clipped_loss(log_probs, old_log_probs, advantages, **clips)
    p = log_probs.detach().exp()
    nll = -sft * log_probs * (p * (1 - p) if phi else 1.0)
    return weights * nll.where(is_demonstration, policy)
