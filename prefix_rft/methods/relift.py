"""ReLIFT: problems that no rollout solves wait for an update on their demonstrations.

Source: arXiv 2506.07527 and its code, whose buffer is lost with the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from prefix_rft.checks import config_section
from prefix_rft.data_types import Group, MiniBatch
from prefix_rft.methods.buffer import Buffer
from prefix_rft.methods.demonstration import (
    calls_for_demonstration,
    demonstration_loss,
    demonstration_row,
)
from prefix_rft.methods.method import Chart, Figure, Setting, TokenLoss
from prefix_rft.methods.mixture import Mixture, MixtureOptions

SFT = "sft"  # the optimizer of the demonstrations


@config_section("relift")
class ReLIFTConfig(MixtureOptions):
    """When there is an update on demonstrations, and its optimizer. `units` are those of the RL."""

    buffer_size: PositiveInt | None = None  # problems of that update; None: prompts_per_step
    sft_entropy_coef: NonNegativeFloat = 0.001  # coefficient of its mean entropy
    sft_lr: PositiveFloat | None = None  # learning rate; None: that of [optimizer]
    sft_max_grad_norm: PositiveFloat | None = None  # longest gradient; None: that of [optimizer]


class ReLIFT(Mixture):
    """RL on all prompts, then, once enough unsolved ones wait, the newest demonstrations."""

    name = "relift"
    section = ReLIFTConfig
    charts = (
        *Mixture.charts,
        Chart(title="Waiting for demonstrations", series={"relift/buffer_sum": "problems"}),
    )

    def __init__(self, config: ReLIFTConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.buffer = Buffer()

    @classmethod
    def optimizers(cls, config: ReLIFTConfig) -> Mapping[str, Mapping[str, Any]]:
        changes = {"lr": config.sft_lr, "max_grad_norm": config.sft_max_grad_norm}
        return {SFT: {name: value for name, value in changes.items() if value is not None}}

    def mini_batches(self, groups: Sequence[Group], step: int) -> list[MiniBatch]:
        mini_batches = super().mini_batches(groups, step)
        unsolved = [group.problem for group in groups if calls_for_demonstration(group)]
        size = self.config.buffer_size or self.setting.prompts_per_step
        if taken := self.buffer.take(step, unsolved, size):
            rows = [demonstration_row(problem, self.setting.eos_token_id) for problem in taken]
            num_tokens = sum(len(row.response_ids) for row in rows)
            mini_batches.append(MiniBatch(rows=rows, normalizer=num_tokens, optimizer=SFT))
        return mini_batches

    def loss(self, mini_batch: MiniBatch) -> TokenLoss:
        if mini_batch.optimizer != SFT:
            return super().loss(mini_batch)
        function = partial(demonstration_loss, entropy_coef=self.config.sft_entropy_coef)
        return TokenLoss(function, temperature=1.0)

    def figures(self, groups: Sequence[Group], *rest: Any) -> Iterator[Figure]:
        yield from super().figures(groups, *rest)
        yield Figure("relift/buffer_sum", len(self.buffer))

    def state(self) -> dict[str, Any]:
        return self.buffer.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.buffer.restore(state)
