"""What a run shows of hints: metrics, charts, lines of the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prefix_rft.methods.method import Chart, Figure

if TYPE_CHECKING:
    from prefix_rft.data_types import Group, Update

CHARTS = (
    Chart(
        title="Hints",
        unit="fraction",
        series={
            "hint/probability": "probability of a part",
            "hint/ratio_mean": "of the demonstration",
            "hint/groups_frac": "groups with one",
            "hint/contains_answer_frac": "hints with the answer",
        },
        limits=(0.0, 1.0),
    ),
    Chart(
        title="Demonstrations",
        unit="nats",
        series={"policy/hint_nll_mean": "negative log-likelihood of hints"},
    ),
)
PROGRESS = {
    "hint": (
        ("probability", "hint/probability", ".2f"),
        ("ratio", "hint/ratio_mean", ".2f"),
        ("nll", "policy/hint_nll_mean", ".3f"),
    )
}


def hint_figures(
    groups: Sequence[Group],
    updates: Sequence[Update],
    has_answer: Callable[[Sequence[int]], bool],
) -> Iterator[Figure]:
    """Lengths of the hints, their likelihood, and the divergence from the reference."""
    for group in groups:
        if not (group.problem.demonstration_ids and group.rollouts):
            continue
        rollout = group.rollouts[0]
        hint = rollout.response_ids[: rollout.prefix_length]
        yield Figure("hint/ratio_mean", len(hint) / len(group.problem.demonstration_ids), 1)
        yield Figure("hint/groups_frac", bool(hint), 1)
        if hint:
            yield Figure("hint/contains_answer_frac", has_answer(hint), 1)
    for update in updates:
        batch = update.batch
        hints = batch.response_mask & batch.prefix_mask
        yield Figure("policy/hint_nll_mean", -update.log_probs[hints].sum(), hints.sum())
        if batch.ref_log_probs is not None:
            tokens = batch.response_mask & ~batch.prefix_mask
            gap = (batch.ref_log_probs - update.log_probs)[tokens]
            yield Figure("policy/ref_kl_mean", (gap.expm1() - gap).sum(), tokens.sum())
