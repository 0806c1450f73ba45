"""What a step looked like: figures for the metrics, one group of rollouts for the report."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import UserError
from prefix_rft.data_types import Group, Problem, Rollout, TrainBatch, TrainRow, Update
from prefix_rft.metrics.step_metrics import StepMetrics


class LogProbGapError(UserError):
    """What the engine sampled from is not what the trainer trains; the run stops."""


UNGRADED = ("no_answer", "timeout", "error")
STATUSES = ("correct", "wrong", *UNGRADED)


def measure_rollouts(step_metrics: StepMetrics, groups: Sequence[Group]) -> None:
    """Rewards, lengths and grader statuses of all rollouts of a step that the policy wrote."""
    measure_generated(step_metrics, groups)
    for rewards in filter(lambda each: len(each) > 1, map(sampled_rewards, groups)):
        step_metrics.mean("reward/zero_std_frac", len(set(rewards)) == 1, 1)


def measure_generated(step_metrics: StepMetrics, groups: Sequence[Group]) -> None:
    """Figures of single rollouts; those of groups that the step drops count as well."""
    rollouts = [each for group in groups for each in group.rollouts if each.is_sampled]
    for rollout in rollouts:
        step_metrics.mean("reward/mean", rollout.reward, 1)
        for name, part in rollout.reward_parts.items():
            step_metrics.mean(f"reward/{name}_mean", part, 1)
        step_metrics.mean("rollout/response_length_mean", len(rollout.response_ids), 1)
        step_metrics.mean("rollout/truncated_frac", rollout.finish_reason == "length", 1)
        step_metrics.add("rollout/generated_tokens_sum", len(rollout.rollout_log_probs))
    statuses = Counter(rollout.status for rollout in rollouts)
    for status in STATUSES if rollouts else ():
        step_metrics.add(f"grader/{status}_sum", statuses[status])
    for status in UNGRADED:
        step_metrics.mean(f"grader/{status}_frac", statuses[status], len(rollouts))


def sampled_rewards(group: Group) -> list[float]:
    """Of the rollouts of a group that the policy wrote."""
    return [rollout.reward for rollout in group.rollouts if rollout.is_sampled]


def measure_updates(
    step_metrics: StepMetrics, groups: Sequence[Group], updates: Sequence[Update]
) -> None:
    """Loss, gradient, clipping, entropy, and the gap between engine and trainer."""
    num_rollouts = sum(rollout.is_sampled for group in groups for rollout in group.rollouts)
    origins = [row.origin for update in updates for row in update.rows]
    num_used = sum(isinstance(origin, Rollout) and origin.is_sampled for origin in origins)
    step_metrics.mean("rollout/left_out_frac", num_rollouts - num_used, num_rollouts)
    step_metrics.add("optim/updates_sum", len(updates))
    step_metrics.add("optim/skipped_updates_sum", 0)
    step_metrics.add("policy/loss_tokens_sum", 0)
    for update in updates:
        _measure_update(step_metrics, update)


def _measure_update(step_metrics: StepMetrics, update: Update) -> None:
    batch, sums = update.batch, update.sums
    step_metrics.mean("policy/loss_mean", update.loss, 1)
    for name, figure in (
        ("policy/clip_low_frac", "clipped_low"),
        ("policy/clip_high_frac", "clipped_high"),
        ("policy/approx_kl_mean", "approx_kl_sum"),
        ("policy/ref_kl_mean", "kl_sum"),
    ):
        if figure in sums:
            step_metrics.mean(name, sums[figure], sums["num_tokens"])
    step_metrics.add("policy/loss_tokens_sum", sums["num_tokens"])
    step_metrics.add("optim/skipped_updates_sum", not update.is_applied)
    if math.isfinite(update.grad_norm):
        step_metrics.mean("optim/grad_norm_mean", update.grad_norm, 1)

    continuation = batch.response_mask & ~batch.prefix_mask & (batch.advantages != 0)
    step_metrics.mean(
        "policy/continuation_entropy_mean", update.entropy[continuation].sum(), continuation.sum()
    )
    for name, value in gap_metrics(update.gap).items():
        step_metrics.maximum(f"rollout/log_prob_gap_{name}", value)


def throughput(metrics: Mapping[str, float], updates: Sequence[Update]) -> dict[str, float]:
    """Tokens a second: generated ones by step and generation, trained ones by update.

    A step without generation is measured by its trained tokens.
    """
    num_generated = metrics.get("rollout/generated_tokens_sum", 0)
    num_trained = sum(len(update.batch.input_ids) for update in updates)
    num_step = num_generated or num_trained
    counts = {"step": num_step, "generate": num_generated, "update": num_trained}
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
        id(row.origin): (update, k, row) for update in updates for k, row in enumerate(update.rows)
    }

    def responses(group: Group) -> list[Rollout | Problem]:
        """The rollouts, and the problem itself if its demonstration is learnt from."""
        return [*group.rollouts, *([group.problem] if id(group.problem) in places else [])]

    def is_learnt_from(group: Group) -> bool:
        return any(id(origin) in places for origin in responses(group))

    group = next(filter(is_learnt_from, groups), groups[0])
    described = [
        _describe(origin, places.get(id(origin)), tokenizer) for origin in responses(group)
    ]
    problem = group.problem
    return {
        "index": problem.index,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "rollouts": described,
    }


def _describe(
    origin: Rollout | Problem,
    place: tuple[Update, int, TrainRow] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """A response token by token; `place`: where it stands in an update, None: left out.

    A demonstration has neither reward nor status.
    """
    if place is None:
        token_ids, prefix_length = origin.response_ids, origin.prefix_length
        selected, entropy, advantage = [False] * len(token_ids), [None] * len(token_ids), 0.0
    else:
        update, k, row = place
        token_ids = row.response_ids
        end = list(accumulate(update.batch.lengths))[k]
        span = slice(end - len(token_ids), end)  # the response is the end of its row
        demonstrated = (each for each in row.segments if each.source == "demonstration")
        prefix_length = sum(len(each.token_ids) for each in demonstrated)
        selected = (update.batch.prefix_mask & update.batch.loss_mask)[span].tolist()
        entropy = update.entropy[span].tolist()
        advantage = row.segments[-1].advantage
    return {
        "tokens": [tokenizer.decode([token]) for token in token_ids],
        "prefix_length": prefix_length,
        "selected": selected,
        "entropy": entropy,
        "reward": getattr(origin, "reward", None),
        "status": getattr(origin, "status", None),
        "advantage": advantage,
    }
