"""What methods share that add up policy gradient, likelihood of demonstrations and entropy.

Over the tokens of a mini-batch of N = prompts x G sequences of at most T tokens:

    loss = 1 / (N T) sum of policy losses  +  c_sft mean of -log_probs  -  c_entropy mean of entropy

The published codes sum the policy loss over rows, and the means over micro-batches. There a
coefficient c means c M / R of these units, with R rows and M micro-batches (with such a term) a
rank; `units = "published_code"` converts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch, Rollout, Source, TrainRow, Update
from prefix_rft.methods.advantage import group_advantages
from prefix_rft.methods.method import Chart, Figure, TokenLoss
from prefix_rft.methods.rft import RFT

if TYPE_CHECKING:
    import torch

LOG_RATIO_BOUND = 20.0


@config_section("mixture")
class MixtureOptions:
    """The fields that the sections of such methods begin with."""

    entropy_coef: NonNegativeFloat = 0.001  # coefficient of the mean entropy
    # what coefficients mean: the formula as it is written, or that of the published code's run
    units: Literal["written", "published_code"] = "written"
    published_rows: PositiveInt = 64  # rows a rank of the published run
    published_micro_batches: PositiveFloat = 5.0  # micro-batches of those rows
    # micro-batches of those that hold a demonstration
    published_demonstration_micro_batches: PositiveFloat = 5.0

    def converted(self, coef: float, *, of_demonstrations: bool = False) -> float:
        """A coefficient of a mean over tokens, in the units of the formula."""
        if self.units == "written":
            return coef
        num_micro_batches = (
            self.published_demonstration_micro_batches
            if of_demonstrations
            else self.published_micro_batches
        )
        return coef * num_micro_batches / self.published_rows


class Mixture(RFT):
    """On-policy groups without a clip, an entropy bonus, and what `group_rows` adds to them."""

    section = MixtureOptions
    needs_demonstrations = True
    scales_advantages = False
    uses_reference = False  # the section [loss] is not its own
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart(
            title="Demonstrations",
            unit="nats",
            series={"policy/demonstration_nll_mean": "negative log-likelihood"},
        ),
        Chart(
            title="Entropy",
            unit="nats",
            series={"policy/demonstration_entropy_mean": "demonstrations"},
        ),
    )
    progress: ClassVar = {"demos": (("nll", "policy/demonstration_nll_mean", ".3f"),)}

    def group_rows(self, group: Group) -> list[TrainRow]:
        """All that a group teaches."""
        return self.policy_rows(group.rollouts)

    def policy_rows(
        self, rollouts: Sequence[Rollout], *, learns_prefix: bool = False
    ) -> list[TrainRow]:
        """Rollouts with their rewards above the mean; they have no likelihood term.

        Args:
            learns_prefix: the advantage is that of prefixes too; else they have none.
        """
        rewards = [rollout.reward for rollout in rollouts]
        advantages = group_advantages(rewards, [False] * len(rewards))
        return [
            TrainRow.of_rollout(
                rollout,
                advantage=advantage.continuation,
                prefix_advantage=advantage.prefix if learns_prefix else 0.0,
                weight=0.0,
            )
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        """`prompts_per_update` groups each; rows without any gradient are left out."""
        size = self.setting.prompts_per_update
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        mini_batches = [
            MiniBatch(
                rows=[row for group in part for row in self.group_rows(group) if self._learns(row)],
                normalizer=len(part) * self.setting.group_size * self.setting.max_response_length,
            )
            for part in parts
        ]
        return [mini_batch for mini_batch in mini_batches if mini_batch.rows]

    def _learns(self, row: TrainRow) -> bool:
        if isinstance(row.origin, Rollout) and self.setting.masks(row.origin):
            return False
        has_term = any(segment.advantage or segment.weight for segment in row.segments)
        return has_term or self.config.entropy_coef > 0

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        return self.token_loss(mini_batch, sft_coef=0.0)

    def token_loss(self, mini_batch: MiniBatch, *, sft_coef: float) -> TokenLoss:
        """The formula above; a token's `weight` weighs its -log_probs within their mean."""
        sft = self.config.converted(sft_coef, of_demonstrations=True)
        entropy = self.config.converted(self.config.entropy_coef)
        function = partial(
            mixture_loss,
            sft=per_token(mini_batch, sft, "demonstration"),
            entropy_coef=per_token(mini_batch, entropy, "policy", "demonstration"),
        )
        return TokenLoss(function, ("old_log_probs", "advantages", "weights"))

    def figures(
        self,
        groups: Sequence[Group],
        updates: Sequence[Update],
        has_answer: Callable[[Sequence[int]], bool],
    ) -> Iterator[Figure]:
        for update in updates:
            tokens = update.batch.response_mask & update.batch.prefix_mask
            nll, entropy = -update.log_probs[tokens], update.entropy[tokens]
            yield Figure("policy/demonstration_nll_mean", nll.sum(), tokens.sum())
            yield Figure("policy/demonstration_entropy_mean", entropy.sum(), tokens.sum())


def mixture_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    sft: float,
    entropy_coef: float,
) -> torch.Tensor:
    """-A ratio on what the policy wrote, -log_probs on demonstrations, entropy on both."""
    policy = -advantages * bounded_ratio(log_probs, old_log_probs)
    return policy - sft * weights * log_probs - entropy_coef * entropy


def bounded_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    return (log_probs - old_log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def per_token(mini_batch: MiniBatch, coef: float, *sources: Source) -> float:
    """The coefficient of a token with which the tokens of `sources` add up to coef x their mean."""
    return coef * mini_batch.normalizer / max(1, num_tokens(mini_batch, *sources))


def num_tokens(mini_batch: MiniBatch, *sources: Source) -> int:
    segments = [segment for row in mini_batch.rows for segment in row.segments]
    return sum(len(segment.token_ids) for segment in segments if segment.source in sources)
