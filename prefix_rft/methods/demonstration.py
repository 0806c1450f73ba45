"""A whole demonstration, its end of sequence included, as a row to learn from; when to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefix_rft.data_types import Group, Problem, Segment, TrainRow

if TYPE_CHECKING:
    import torch


def whole_demonstration(problem: Problem, eos_token_id: int) -> tuple[int, ...]:
    return (*problem.demonstration_ids, eos_token_id)


def demonstration_row(
    problem: Problem, eos_token_id: int, *, advantage: float = 0.0, weight: float = 1.0
) -> TrainRow:
    segment = Segment(
        token_ids=whole_demonstration(problem, eos_token_id),
        source="demonstration",
        advantage=advantage,
        weight=weight,
    )
    return TrainRow(prompt_ids=problem.prompt_ids, segments=(segment,), origin=problem)


def calls_for_demonstration(group: Group, *, gate: int = 0) -> bool:
    """Whether at most `gate` of its graded rollouts are correct, and there is a demonstration."""
    num_correct = sum(rollout.status == "correct" for rollout in group.rollouts)
    return num_correct <= gate and bool(group.rollouts and group.problem.demonstration_ids)


def demonstration_loss(
    log_probs: torch.Tensor, entropy: torch.Tensor, *, entropy_coef: float
) -> torch.Tensor:
    """The negative log-likelihood with an entropy bonus."""
    return -log_probs - entropy_coef * entropy
