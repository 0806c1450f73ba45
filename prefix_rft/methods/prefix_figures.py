"""What a run shows of hybrid rollouts and their prefixes: metrics, charts, lines of the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prefix_rft.methods.method import Chart, Figure

if TYPE_CHECKING:
    from prefix_rft.data_types import Group, Update

CHARTS = (
    Chart(
        title="Reward",
        series={
            "reward/on_policy_mean": "on-policy rollouts",
            "reward/hybrid_mean": "hybrid rollouts",
        },
    ),
    Chart(
        title="Prefix window",
        unit="fraction of the demonstration",
        series={
            "prefix/low": "window, low",
            "prefix/high": "window, high",
            "prefix/ratio_mean": "mean drawn",
            "prefix/contains_answer_frac": "prefixes with the answer",
        },
        form="window",
        limits=(0.0, 1.0),
    ),
    Chart(title="Entropy", unit="nats", series={"policy/prefix_entropy_mean": "prefix"}),
    Chart(
        title="Rollouts",
        unit="fraction",
        series={
            "policy/kept_frac": "prefix tokens kept",
            "prefix/groups_frac": "groups with a prefix",
        },
    ),
)
PROGRESS = {
    "reward": (
        ("on-policy", "reward/on_policy_mean", ".3f"),
        ("hybrid", "reward/hybrid_mean", ".3f"),
    ),
    "prefix": (
        ("from", "prefix/low", ".2f"),
        ("to", "prefix/high", ".2f"),
        ("kept", "policy/kept_frac", ".2f"),
    ),
    "entropy": (("prefix", "policy/prefix_entropy_mean", ".3f"),),
}


def prefix_figures(
    groups: Sequence[Group],
    updates: Sequence[Update],
    has_answer: Callable[[Sequence[int]], bool],
) -> Iterator[Figure]:
    """Rewards by kind of rollout, lengths of prefixes, their selection and entropy."""
    for group in groups:
        yield Figure("prefix/groups_frac", any(each.is_hybrid for each in group.rollouts), 1)
        for rollout in group.rollouts:
            kind = "hybrid" if rollout.is_hybrid else "on_policy"
            yield Figure(f"reward/{kind}_mean", rollout.reward, 1)
            if rollout.is_hybrid:
                ratio = rollout.prefix_length / len(group.problem.demonstration_ids)
                holds_answer = has_answer(rollout.response_ids[: rollout.prefix_length])
                yield Figure("prefix/ratio_mean", ratio, 1)
                yield Figure("prefix/contains_answer_frac", holds_answer, 1)
    for update in updates:
        prefix = update.batch.prefix_mask & update.batch.has_advantage
        selected = update.batch.selected_mask
        yield Figure("policy/kept_frac", selected.sum(), prefix.sum())
        if selected.any():  # else nobody asked for the entropies
            yield Figure("policy/prefix_entropy_mean", update.entropy[prefix].sum(), prefix.sum())
