"""One training step, top to bottom: sample groups, take advantages, select, update.

Once the groups are sampled every rank knows the whole mini-batch, decides the same, and computes
its share of the micro-batches.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from rft_kernels import PolicyConfig
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from prefix_rft.config import Config, make_method
from prefix_rft.data import Problems
from prefix_rft.data_types import (
    Group,
    MiniBatch,
    Problem,
    TrainBatch,
    Update,
)
from prefix_rft.methods import TokenLoss
from prefix_rft.metrics import (
    StepMetrics,
    check_gap,
    describe_group,
    log_prob_gap,
    measure_rollouts,
    measure_updates,
    throughput,
)
from prefix_rft.model import Policy, World, end_of_response_id, full_tensor
from prefix_rft.reward import Rewarder
from prefix_rft.rollout import RolloutEngine
from prefix_rft.train.checkpoint import CheckpointWriter, TrainerState, load_checkpoint
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.mismatch import mismatched_rows, without_rows
from prefix_rft.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from prefix_rft.train.packing import dummy_batch, pack, plan_micro_batches, take_rows, token_index
from prefix_rft.train.reference import Reference
from prefix_rft.train.sampler import Sampler

POLICY = "policy"  # the optimizer that every method has


class Trainer:
    """The state of a run and the step that advances it.

    Everything random and scheduled in step t follows from (config, t): a run continues from
    `step_index`, the weights and the optimizer.
    """

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        engine: RolloutEngine,
        rewarder: Rewarder,
        problems: Sequence[Problem],
        reference: Reference | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.world = World() if world is None else world
        self.policy = policy
        self.tokenizer = tokenizer
        self.engine = engine
        self.rewarder = rewarder
        self.problems = Problems.of(problems)
        self.reference = reference
        self.method = make_method(config, eos_token_id=end_of_response_id(tokenizer))
        self.sampler = Sampler(
            config,
            method=self.method,
            tokenizer=tokenizer,
            engine=engine,
            rewarder=rewarder,
            world=self.world,
        )
        self.updates_per_step = config.trainer.prompts_per_step // config.trainer.prompts_per_update
        self.optimizer_configs = {POLICY: config.optimizer} | {
            name: replace(config.optimizer, **changes)
            for name, changes in self.method.optimizers(self.method.config).items()
        }
        self.optimizers = {
            name: make_optimizer(policy.parameters(), each, policy.device)
            for name, each in self.optimizer_configs.items()
        }
        self.step_index = 0  # steps done

    def train_step(self, interrupt: Interrupt) -> tuple[dict[str, float], dict]:
        """Advance by one step; a signal that comes before the first update cancels it.

        Returns:
            the step's metrics by name, and one group of rollouts described for the report.
        """
        step_metrics = StepMetrics()
        with step_metrics.phase("step"):
            groups, updates = self.advance(step_metrics, interrupt)
        measure_rollouts(step_metrics, groups)
        measure_updates(step_metrics, groups, updates)
        for figure in self.method.figures(groups, updates, self.has_answer):
            step_metrics.figure(*figure)
        metrics = step_metrics.result()
        metrics |= throughput(metrics, updates)
        return metrics, describe_group(groups, updates, self.tokenizer)

    def advance(
        self, step_metrics: StepMetrics, interrupt: Interrupt
    ) -> tuple[list[Group], list[Update]]:
        """Sample, update, count the step; of its figures only times and memory are taken."""
        groups = self.rollouts(step_metrics, interrupt)
        mini_batches = self.method.mini_batches(groups, self.step_index)
        packed = [(each, self.pack(each, step_metrics)) for each in mini_batches]
        for name, config in self.optimizer_configs.items():
            lr = learning_rate(self.step_index, config, self.config.trainer.num_steps)
            set_learning_rate(self.optimizers[name], lr)
            step_metrics.add("optim/lr" if name == POLICY else f"optim/{name}_lr", lr)
        updates: list[Update] = []
        for mini_batch, batch in packed:
            if batch is None:
                continue
            has_moved = bool(updates)
            updates.append(self.update(mini_batch, batch, step_metrics, has_moved=has_moved))
        self.step_index += 1
        if self.reference is not None:
            self.reference.follow(self.policy, self.step_index)
        return groups, updates

    def has_answer(self, token_ids: Sequence[int]) -> bool:
        return self.rewarder.has_answer(self.tokenizer.decode(token_ids))

    def save(self, checkpoints: CheckpointWriter) -> int:
        """Write a checkpoint; returns the steps done in it. Collective."""
        state = TrainerState(
            step=self.step_index,
            data_fingerprint=self.data_fingerprint,
            method=self.method.state(),
        )
        checkpoints.save(self.policy.model, self.optimizers, state, reference=self.moving_reference)
        return self.step_index

    @cached_property
    def data_fingerprint(self) -> str:
        return self.problems.fingerprint()

    @property
    def moving_reference(self) -> nn.Module | None:
        """The model of a reference that checkpoints have to keep."""
        if self.reference is None or not self.reference.update_every:
            return None
        return self.reference.policy.model

    def restore(self, checkpoint: Path) -> None:
        """Take up the weights, the optimizers, the step and the method's state. Collective."""
        state = load_checkpoint(
            checkpoint,
            self.policy.model,
            self.optimizers,
            data_fingerprint=self.data_fingerprint,
            old_fingerprint=lambda: old_fingerprint(self.problems),
            reference=self.moving_reference,
            world=self.world,
        )
        self.step_index = state.step
        self.method.restore(state.method)

    def rollouts(self, step_metrics: StepMetrics, interrupt: Interrupt) -> list[Group]:
        """The groups of this step, generated and scored."""
        for name, value in self.method.schedule(self.step_index).items():
            step_metrics.add(name, value)
        return self.sampler.groups(
            self.problems, self.step_index, self.policy, step_metrics, interrupt
        )

    def pack(self, mini_batch: MiniBatch, step_metrics: StepMetrics) -> TrainBatch | None:
        """The rows in tensors, with the log-probs that the loss compares those of the update with:
        of the policy before, where it moves within the step, and of the reference.

        Returns:
            the batch; rows too far from the engine are not in its loss. None: none is left.
        Raises:
            LogProbGapError: the engine sampled from something else; nothing was updated.
        """
        batch = pack(mini_batch.rows, device=self.policy.device, dtype=self.policy.stats_dtype)
        loss, rows = self.method.loss(mini_batch), range(len(batch.lengths))
        limit = self.config.rollout.max_sequence_mismatch if mini_batch.num_sampled else None
        keeps_old = self.updates_per_step > 1 and takes(loss, "old_log_probs")
        if keeps_old or limit is not None:
            with step_metrics.phase("old_policy"):
                log_probs, _ = self.token_stats(batch, rows)
            check_gap(log_prob_gap(batch, log_probs), self.config.rollout.max_log_prob_gap)
            if keeps_old:
                batch = replace(batch, old_log_probs=log_probs)
            if limit is not None:
                level = self.config.rollout.mismatch_level
                out = mismatched_rows(batch, log_probs, limit=limit, level=level)
                step_metrics.mean("rollout/mismatched_frac", out.sum(), mini_batch.num_sampled)
                batch = without_rows(batch, out)
                if not batch.response_mask.any():
                    return None
        if self.reference is not None and takes(loss, "ref_log_probs"):
            temperature = loss.temperature if isinstance(loss, TokenLoss) else None
            with step_metrics.phase("reference"), self.reference.at_work() as reference:
                log_probs, _ = self.token_stats(
                    batch, rows, policy=reference, temperature=temperature
                )
            batch = replace(batch, ref_log_probs=log_probs)
        return batch

    def update(
        self,
        mini_batch: MiniBatch,
        batch: TrainBatch,
        step_metrics: StepMetrics,
        *,
        has_moved: bool = False,
    ) -> Update:
        """Prepare the batch, sum the gradient over micro-batches, take one optimizer step.

        A gradient that is not finite, or too large for the method, is dropped, and counted.

        Args:
            has_moved: the policy is no longer the one that generated.
        Raises:
            LogProbGapError: the engine sampled from something else; nothing was updated.
        """
        loss = self.method.loss(mini_batch)
        with step_metrics.phase("old_policy"):
            rows = self.method.stats_rows(mini_batch)
            stats = self.token_stats(batch, rows)
            batch = self.method.prepare(batch, *stats, self.step_index)
            entropy_before = stats[1]
        with step_metrics.phase("update"):
            # On the host, for the loss to know how many rows it computes: one wait an update.
            is_active = batch.loss_mask.cpu()
            log_probs, entropy = torch.zeros_like(entropy_before), torch.zeros_like(entropy_before)
            losses = []
            for picks in self.micro_batches(batch.lengths):
                index = token_index(batch, picks)
                part = take_rows(batch, picks) if picks else dummy_batch(batch)
                active_rows = is_active[index.cpu()].nonzero()[:, 0].to(index.device)
                part = replace(part, active_rows=active_rows)
                out = self.policy.loss(part, normalizer=mini_batch.normalizer, loss=loss)
                out.loss.backward()
                log_probs[index] = out.log_probs[: len(index)]
                entropy[index] = out.entropy[: len(index)]
                losses.append(out.metrics | {"loss": out.loss.detach()})
            sums = {name: sum(each[name] for each in losses) for name in losses[0]}
            sums.pop("ratio_max", None)  # no sum
            self.world.all_reduce(log_probs, entropy, *sums.values())
            gap = log_prob_gap(batch, log_probs)
            if batch.old_log_probs is None:
                gap = gap[:0] if has_moved else gap
                check_gap(gap, self.config.rollout.max_log_prob_gap)
            grad_norm, is_applied = self.optimizer_step(mini_batch)
        asked = torch.zeros_like(batch.prefix_mask)
        asked[token_index(batch, rows)] = True
        return Update(
            rows=mini_batch.rows,
            batch=batch,
            log_probs=log_probs,
            entropy=torch.where(batch.prefix_mask & asked, entropy_before, entropy),
            loss=sums.pop("loss"),
            sums=sums,
            gap=gap,
            grad_norm=grad_norm,
            is_applied=is_applied,
        )

    def optimizer_step(self, mini_batch: MiniBatch) -> tuple[float, bool]:
        """Clip the gradient and apply it; its norm before, and whether it was fit to be applied."""
        name = mini_batch.optimizer
        config, optimizer = self.optimizer_configs[name], self.optimizers[name]
        norm = clip_grad_norm_(self.policy.model.parameters(), config.max_grad_norm)
        norm = full_tensor(norm).item()
        is_applied = math.isfinite(norm) and norm <= mini_batch.largest_norm
        if is_applied:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, is_applied

    def token_stats(
        self,
        batch: TrainBatch,
        rows: Sequence[int],
        *,
        policy: Policy | None = None,
        temperature: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropy of `rows`, [T] each; 0 on other rows.

        Args:
            policy: None: the current one.
            temperature: None: that of the rollouts.
        """
        policy = self.policy if policy is None else policy
        log_probs = torch.zeros_like(batch.advantages)
        entropy = torch.zeros_like(batch.advantages)
        for picks in self.micro_batches([batch.lengths[row] for row in rows]):
            part = [rows[pick] for pick in picks]
            taken = take_rows(batch, part) if part else dummy_batch(batch)
            stats = policy.token_stats(taken, temperature=temperature)
            index = token_index(batch, part)
            log_probs[index] = stats.log_probs[: len(index)]
            entropy[index] = stats.entropy[: len(index)]
        self.world.all_reduce(log_probs, entropy)
        return log_probs, entropy

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """This rank's: rows by index; an empty one keeps the rank in step with the others."""
        budget = self.config.trainer.micro_batch_tokens
        return plan_micro_batches(lengths, budget, self.world.size)[self.world.rank]


def old_fingerprint(problems: Sequence[Problem]) -> str:
    """The digest of problems in checkpoints up to format 4; walks all of their ids."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.prompt_ids, problem.demonstration_ids)).encode())
        digest.update(problem.answer.encode())
    return digest.hexdigest()[:16]


def takes(loss: PolicyConfig | TokenLoss, name: str) -> bool:
    """Whether a loss reads the old log-probs, or those of the reference."""
    if isinstance(loss, TokenLoss):
        return name in loss.inputs
    return name == "old_log_probs" or loss.uses_kl
