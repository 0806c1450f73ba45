"""What a step looked like: figures for the metrics, one group of rollouts for the report."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from prefix_rft.data_types import Group, Update
from prefix_rft.ledger import Ledger

STATUSES = ("correct", "wrong", "no_answer", "timeout", "error")


def measure_rollouts(
    ledger: Ledger,
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
        ledger.mean("reward/mean", rollout.reward, 1)
        ledger.mean(f"reward/{kind}_mean", rollout.reward, 1)
        ledger.mean("rollout/response_length_mean", len(rollout.response_ids), 1)
        ledger.mean("rollout/truncated_share", rollout.finish_reason == "length", 1)
        ledger.add("rollout/generated_tokens_sum", len(rollout.rollout_log_probs))
    for rollout, demonstration_length in hybrids:
        prefix = tokenizer.decode(rollout.response_ids[: rollout.prefix_length])
        ledger.mean("prefix/ratio_mean", rollout.prefix_length / demonstration_length, 1)
        ledger.mean("prefix/contains_answer_share", has_answer(prefix), 1)
    statuses = Counter(rollout.status for rollout in rollouts)
    for status in STATUSES:
        ledger.add(f"grader/{status}_sum", statuses[status])


def measure_updates(ledger: Ledger, groups: Sequence[Group], updates: Sequence[Update]) -> None:
    """Loss, gradient, clipping, selection, entropies, and the gap between engine and trainer."""
    num_rollouts = sum(len(group.rollouts) for group in groups)
    num_rows = sum(len(update.rows) for update in updates)
    ledger.mean("rollout/left_out_share", num_rollouts - num_rows, num_rollouts)
    ledger.add("optim/skipped_updates_sum", 0)
    for update in updates:
        _measure_update(ledger, update)


def _measure_update(ledger: Ledger, update: Update) -> None:
    batch, sums = update.batch, update.sums
    ledger.mean("policy/loss_mean", update.loss, 1)
    num_tokens = sums["num_tokens"]
    ledger.mean("policy/clip_low_frac", sums["clipped_low"], num_tokens)
    ledger.mean("policy/clip_high_frac", sums["clipped_high"], num_tokens)
    ledger.mean("policy/approx_kl_mean", sums["approx_kl_sum"], num_tokens)
    finite = math.isfinite(update.grad_norm)
    ledger.add("optim/skipped_updates_sum", not finite)
    if finite:
        ledger.mean("optim/grad_norm_mean", update.grad_norm, 1)

    prefix = batch.prefix_mask
    continuation = batch.response_mask & ~prefix & (batch.advantages != 0)
    ledger.mean("policy/kept_share", batch.selected_mask.sum(), prefix.sum())
    ledger.mean("policy/prefix_entropy_mean", update.entropy[prefix].sum(), prefix.sum())
    ledger.mean(
        "policy/continuation_entropy_mean", update.entropy[continuation].sum(), continuation.sum()
    )
    before = update.log_probs if batch.old_log_probs is None else batch.old_log_probs
    gap = (before - batch.rollout_log_probs)[continuation].abs()
    if len(gap):
        ledger.mean("rollout/log_prob_gap_mean", gap.sum(), len(gap))
        ledger.maximum("rollout/log_prob_gap_max", gap.max())


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
