"""Prefix-RFT: some rollouts of a group start inside the demonstration (arXiv 2507.01679)."""

from fractions import Fraction

import numpy as np
import torch
from rft_kernels import select_top_entropy

from prefix_rft.data_types import Problem, RolloutRequest, TrainBatch
from prefix_rft.methods.prefix import cut_prefix, prefix_window
from prefix_rft.methods.rft import RFT


class PrefixRFT(RFT):
    """Dr. GRPO with hybrid rollouts; of their prefix tokens the most uncertain get gradient."""

    def window(self, step: int) -> tuple[float, float]:
        """The interval of prefix ratios at `step`."""
        horizon = self.config.prefix.horizon_steps or self.config.trainer.num_steps
        return prefix_window(step, config=self.config.prefix, horizon_steps=horizon)

    def schedule(self, step: int) -> dict[str, float]:
        low, high = self.window(step)
        return {"prefix/low": low, "prefix/high": high}

    def plan_group(self, problem: Problem, step: int) -> list[RolloutRequest]:
        requests = super().plan_group(problem, step)
        if not problem.demonstration_ids:
            return requests
        rng = np.random.default_rng([self.config.seed, step, problem.index])
        for k in range(self.config.prefix.num_hybrid):
            requests[-1 - k] = self._hybrid(problem, rng.uniform(*self.window(step)))
        return requests

    def _hybrid(self, problem: Problem, ratio: float) -> RolloutRequest:
        limit = self.config.rollout.max_response_length
        prefix_ids = cut_prefix(
            problem.demonstration_ids,
            ratio,
            min_tokens=self.config.prefix.min_prefix_tokens,
            max_response_length=limit,
        )
        return RolloutRequest(
            prompt_ids=problem.prompt_ids,
            prefix_ids=prefix_ids,
            max_new_tokens=limit - len(prefix_ids),
        )

    def select(self, entropy: torch.Tensor, batch: TrainBatch, seed: int) -> torch.Tensor:
        """The `selection_fraction` of the prefix tokens with the highest entropy.

        Args:
            entropy: [T] nats, of the policy before the update.
            batch: the whole mini-batch.
            seed: of the order "random".
        """
        config = self.config.method
        return select_top_entropy(
            entropy,
            batch.prefix_mask,
            fraction=Fraction(str(config.selection_fraction)),
            cu_seqlens=batch.cu_seqlens if config.selection_scope == "sequence" else None,
            order=config.selection_order,
            seed=seed,
        )
