"""What a step looked like: figures for the metrics, one group of rollouts for the report."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import UserError
from prefix_rft.data_types import Group, TrainBatch, Update
from prefix_rft.metrics.step_metrics import StepMetrics


class LogProbGapError(UserError):
    """What the engine sampled from is not what the trainer trains; the run stops."""


STATUSES = ("correct", "wrong", "no_answer", "timeout", "error")


def measure_rollouts(
    step_metrics: StepMetrics,
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    has_answer: Callable[[str], bool],
) -> None:
    """Rewards, lengths, prefixes and grader statuses of all rollouts of a step."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    hybrids = [
        (rollout, len(group.problem.demonstration_ids))
        for group in groups
        for rollout in group.rollouts
        if rollout.is_hybrid
    ]
    for rollout in rollouts:
        kind = "hybrid" if rollout.is_hybrid else "ordinary"
        step_metrics.mean("reward/mean", rollout.reward, 1)
        step_metrics.mean(f"reward/{kind}_mean", rollout.reward, 1)
        step_metrics.mean("rollout/response_length_mean", len(rollout.response_ids), 1)
        step_metrics.mean("rollout/truncated_frac", rollout.finish_reason == "length", 1)
        step_metrics.add("rollout/generated_tokens_sum", len(rollout.rollout_log_probs))
    for rollout, demonstration_length in hybrids:
        prefix = tokenizer.decode(rollout.response_ids[: rollout.prefix_length])
        step_metrics.mean("prefix/ratio_mean", rollout.prefix_length / demonstration_length, 1)
        step_metrics.mean("prefix/contains_answer_frac", has_answer(prefix), 1)
    statuses = Counter(rollout.status for rollout in rollouts)
    for status in STATUSES:
        step_metrics.add(f"grader/{status}_sum", statuses[status])


def measure_updates(
    step_metrics: StepMetrics, groups: Sequence[Group], updates: Sequence[Update]
) -> None:
    """Loss, gradient, clipping, selection, entropies, and the gap between engine and trainer."""
    num_rollouts = sum(len(group.rollouts) for group in groups)
    num_rows = sum(len(update.rows) for update in updates)
    step_metrics.mean("rollout/left_out_frac", num_rollouts - num_rows, num_rollouts)
    step_metrics.add("optim/skipped_updates_sum", 0)
    for update in updates:
        _measure_update(step_metrics, update)


def _measure_update(step_metrics: StepMetrics, update: Update) -> None:
    batch, sums = update.batch, update.sums
    step_metrics.mean("policy/loss_mean", update.loss, 1)
    num_tokens = sums["num_tokens"]
    step_metrics.mean("policy/clip_low_frac", sums["clipped_low"], num_tokens)
    step_metrics.mean("policy/clip_high_frac", sums["clipped_high"], num_tokens)
    step_metrics.mean("policy/approx_kl_mean", sums["approx_kl_sum"], num_tokens)
    finite = math.isfinite(update.grad_norm)
    step_metrics.add("optim/skipped_updates_sum", not finite)
    if finite:
        step_metrics.mean("optim/grad_norm_mean", update.grad_norm, 1)

    prefix = batch.prefix_mask
    continuation = batch.response_mask & ~prefix & (batch.advantages != 0)
    step_metrics.mean("policy/kept_frac", batch.selected_mask.sum(), prefix.sum())
    step_metrics.mean("policy/prefix_entropy_mean", update.entropy[prefix].sum(), prefix.sum())
    step_metrics.mean(
        "policy/continuation_entropy_mean", update.entropy[continuation].sum(), continuation.sum()
    )
    for name, value in gap_metrics(log_prob_gap(batch, update.log_probs)).items():
        step_metrics.maximum(f"rollout/log_prob_gap_{name}", value)


def throughput(metrics: Mapping[str, float], updates: Sequence[Update]) -> dict[str, float]:
    """Tokens a second: generated ones by step and generation, trained ones by update."""
    num_generated = metrics["rollout/generated_tokens_sum"]
    num_trained = sum(len(update.batch.input_ids) for update in updates)
    counts = {"step": num_generated, "generate": num_generated, "update": num_trained}
    return {
        f"throughput/{phase}_tokens_per_s": count / metrics[f"time/{phase}_s"]
        for phase, count in counts.items()
        if count
    }


def log_prob_gap(batch: TrainBatch, log_probs: torch.Tensor) -> torch.Tensor:
    """Trainer minus engine, [N] nats: on tokens of continuations, where both are finite.

    Args:
        log_probs: [T] by the trainer, of the policy that generated; those of `batch` come first.
    """
    before = log_probs if batch.old_log_probs is None else batch.old_log_probs
    continuation = batch.response_mask & ~batch.prefix_mask & (batch.advantages != 0)
    gap = (before - batch.rollout_log_probs)[continuation]
    return gap[gap.isfinite()]


def gap_metrics(gap: torch.Tensor) -> dict[str, float]:
    """Mean, 99th percentile and maximum of |gap|, and E[e^gap - 1 - gap], the KL divergence from
    engine to trainer (http://joschu.net/blog/kl-approx.html, k3), in nats.
    """
    if not len(gap):
        return {}
    size = gap.abs()
    rank = max(1, round(0.99 * len(size)))
    figures = {
        "mean": size.mean(),
        "p99": size.kthvalue(rank).values,
        "max": size.max(),
        "kl": (gap.expm1() - gap).mean(),
    }
    return {name: value.item() for name, value in figures.items()}


def check_gap(gap: torch.Tensor, limit: float | None) -> None:
    """Raise LogProbGapError where the mean of |gap| is above `limit` nats."""
    figures = gap_metrics(gap)
    if limit is not None and figures and figures["mean"] > limit:
        told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        raise LogProbGapError(
            f"rollout.max_log_prob_gap: expected at most {limit} nats between the log-probs of the "
            f"engine and the trainer, got {told} over {len(gap)} tokens. The engine may hold other "
            "weights, another temperature or dtype, or sample from a truncated distribution; "
            "checkpoints are intact"
        )


def describe_group(
    groups: Sequence[Group], updates: Sequence[Update], tokenizer: PreTrainedTokenizerBase
) -> dict:
    """The first group that has a gradient (else the first), token by token, for the report."""
    places = {
        id(row.rollout): (update, k, row.advantage)
        for update in updates
        for k, row in enumerate(update.rows)
    }
    group = next(
        (group for group in groups if any(id(rollout) in places for rollout in group.rollouts)),
        groups[0],
    )
    described = []
    for rollout in group.rollouts:
        length = len(rollout.response_ids)
        selected, entropy, advantage = [False] * length, [None] * length, 0.0
        if id(rollout) in places:
            update, k, advantage = places[id(rollout)]
            end = list(accumulate(update.batch.lengths))[k]
            span = slice(end - length, end)  # the response is the end of its row
            selected = update.batch.selected_mask[span].tolist()
            entropy = update.entropy[span].tolist()
        described.append(
            {
                "tokens": [tokenizer.decode([token]) for token in rollout.response_ids],
                "prefix_length": rollout.prefix_length,
                "selected": selected,
                "entropy": entropy,
                "reward": rollout.reward,
                "status": rollout.status,
                "advantage": advantage,
            }
        )
    problem = group.problem
    return {
        "index": problem.index,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "rollouts": described,
    }
