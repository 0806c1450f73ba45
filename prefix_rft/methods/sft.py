"""SFT: the mean negative log-likelihood of the demonstrations' tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch, Problem, RolloutRequest
from prefix_rft.methods.demonstration import demonstration_row
from prefix_rft.methods.method import Figure, Method, TokenLoss

if TYPE_CHECKING:
    import torch

    from prefix_rft.data_types import Update


@config_section("sft")
class SFTConfig:
    """How long to train on the demonstrations."""

    epochs: PositiveInt | None = None  # passes over the problems; None: trainer.num_steps steps


def negative_log_likelihood(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    return -log_probs


class SFT(Method):
    """No rollouts: demonstration and end of sequence, each token of an update weighed alike."""

    name = "sft"
    section = SFTConfig

    @classmethod
    def num_steps(cls, config: SFTConfig, num_problems: int, prompts_per_step: int) -> int | None:
        if config.epochs is None:
            return None
        return math.ceil(config.epochs * num_problems / prompts_per_step)

    @classmethod
    def accepts(cls, problem: Problem) -> bool:
        return bool(problem.demonstration_ids)

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        return []

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        size = self.setting.prompts_per_update
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        return [self._mini_batch(part) for part in parts]

    def _mini_batch(self, groups: Sequence[Group]) -> MiniBatch:
        eos = self.setting.eos_token_id
        rows = [demonstration_row(group.problem, eos) for group in groups]
        return MiniBatch(rows=rows, normalizer=sum(len(row.response_ids) for row in rows))

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        return TokenLoss(negative_log_likelihood, temperature=1.0)

    def figures(
        self,
        groups: Sequence[Group],
        updates: Sequence[Update],
        has_answer: Callable[[Sequence[int]], bool],
    ) -> Iterator[Figure]:
        for update in updates:
            num_tokens = update.sums["num_tokens"]
            yield Figure("sft/num_tokens_sum", num_tokens)
            yield Figure(
                "policy/demonstration_entropy_mean", update.sums["entropy_sum"], num_tokens
            )
