"""Which tokens of a mini-batch get gradient: a fraction of them, by the entropy of the policy.

Source: arXiv 2507.01679, section 3.
"""

from __future__ import annotations

import fractions
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from prefix_rft.checks import Fraction, config_section
from prefix_rft.data_types import MiniBatch, TrainBatch

if TYPE_CHECKING:
    import torch


@config_section("selection")
class SelectionOptions:
    """The fields of a method that trains on some of the tokens only."""

    # fraction of the prefix tokens that are trained on; 0: a prefix is context and nothing else
    selection_fraction: Fraction = 0.2
    selection_scope: Literal["minibatch", "sequence"] = "minibatch"  # pool to select from
    selection_order: Literal["high", "low", "random"] = "high"  # entropy of those selected
    # whose tokens: those of prefixes, or, in a pool of their own, also the policy's
    selection_on: Literal["prefix", "response"] = "prefix"

    def selects_from(self, mini_batch: MiniBatch) -> list[int]:
        """The rows whose entropies decide something."""
        if self.selection_fraction == 0:
            return []
        if self.selection_on == "response":
            return list(range(len(mini_batch.rows)))
        return [i for i, row in enumerate(mini_batch.rows) if row.origin.is_hybrid]

    def select(self, batch: TrainBatch, entropy: torch.Tensor, seed: int) -> TrainBatch:
        """The batch without the tokens that are not selected; only rows with an advantage have any.

        Args:
            entropy: [T] nats, of the policy before the update.
            seed: of the random order.
        """
        prefix = batch.prefix_mask & batch.has_advantage
        batch = replace(batch, selected_mask=self._selected(batch, prefix, entropy, seed))
        if self.selection_on == "prefix":
            return batch
        own = batch.response_mask & ~batch.prefix_mask & batch.has_advantage
        selected = self._selected(batch, own, entropy, seed)
        return replace(batch, response_mask=batch.response_mask & batch.prefix_mask | selected)

    def _selected(
        self, batch: TrainBatch, candidates: torch.Tensor, entropy: torch.Tensor, seed: int
    ) -> torch.Tensor:
        from rft_kernels import select_top_entropy

        return select_top_entropy(
            entropy,
            candidates,
            fraction=fractions.Fraction(str(self.selection_fraction)),
            cu_seqlens=batch.cu_seqlens if self.selection_scope == "sequence" else None,
            order=self.selection_order,
            seed=seed,
        )
