"""One training step, top to bottom: sample groups, take advantages, select, update.

Once the groups are sampled every rank knows the whole mini-batch, decides the same, and computes
its share of the micro-batches.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rft_kernels import PolicyConfig
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from prefix_rft.config import Config
from prefix_rft.data_types import (
    Group,
    MiniBatch,
    Problem,
    TrainBatch,
    Update,
)
from prefix_rft.methods import Method, Setting, TokenLoss, find_method
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
from prefix_rft.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from prefix_rft.train.packing import dummy_batch, pack, plan_micro_batches, take_rows, token_index
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
        world: World | None = None,
    ) -> None:
        self.config = config
        self.world = World() if world is None else world
        self.policy = policy
        self.tokenizer = tokenizer
        self.engine = engine
        self.rewarder = rewarder
        self.problems = problems
        self.method = make_method(config, tokenizer)
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
            groups = self.rollouts(step_metrics, interrupt)
            mini_batches = self.method.mini_batches(groups, self.step_index)
            batches = [self.pack(mini_batch, step_metrics) for mini_batch in mini_batches]
            for name, config in self.optimizer_configs.items():
                lr = learning_rate(self.step_index, config, self.config.trainer.num_steps)
                set_learning_rate(self.optimizers[name], lr)
                step_metrics.add("optim/lr" if name == POLICY else f"optim/{name}_lr", lr)
            updates: list[Update] = []
            for mini_batch, batch in zip(mini_batches, batches, strict=True):
                has_moved = bool(updates)
                updates.append(self.update(mini_batch, batch, step_metrics, has_moved=has_moved))
            self.step_index += 1
        measure_rollouts(step_metrics, groups)
        measure_updates(step_metrics, groups, updates)
        for figure in self.method.figures(groups, updates, self.has_answer):
            step_metrics.figure(*figure)
        metrics = step_metrics.result()
        metrics |= throughput(metrics, updates)
        return metrics, describe_group(groups, updates, self.tokenizer)

    def has_answer(self, token_ids: Sequence[int]) -> bool:
        return self.rewarder.has_answer(self.tokenizer.decode(token_ids))

    def save(self, checkpoints: CheckpointWriter) -> int:
        """Write a checkpoint; returns the steps done in it. Collective."""
        state = TrainerState(
            step=self.step_index,
            data_fingerprint=fingerprint(self.problems),
            method=self.method.state(),
        )
        checkpoints.save(self.policy.model, self.optimizers, state)
        return self.step_index

    def restore(self, checkpoint: Path) -> None:
        """Take up the weights, the optimizers, the step and the method's state. Collective."""
        state = load_checkpoint(
            checkpoint,
            self.policy.model,
            self.optimizers,
            data_fingerprint=fingerprint(self.problems),
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

    def pack(self, mini_batch: MiniBatch, step_metrics: StepMetrics) -> TrainBatch:
        """The rows in tensors; where the policy moves within the step, with its log-probs before.

        Raises:
            LogProbGapError: the engine sampled from something else; nothing was updated.
        """
        batch = pack(mini_batch.rows, device=self.policy.device, dtype=self.policy.stats_dtype)
        if self.updates_per_step == 1 or not takes_old_log_probs(self.method.loss(mini_batch)):
            return batch
        with step_metrics.phase("old_policy"):
            log_probs, _ = self.token_stats(batch, range(len(batch.lengths)))
        check_gap(log_prob_gap(batch, log_probs), self.config.rollout.max_log_prob_gap)
        return replace(batch, old_log_probs=log_probs)

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
        self, batch: TrainBatch, rows: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropy of `rows` under the current policy, [T] each; 0 on other rows."""
        log_probs = torch.zeros_like(batch.advantages)
        entropy = torch.zeros_like(batch.advantages)
        for picks in self.micro_batches([batch.lengths[row] for row in rows]):
            part = [rows[pick] for pick in picks]
            stats = self.policy.token_stats(take_rows(batch, part) if part else dummy_batch(batch))
            index = token_index(batch, part)
            log_probs[index] = stats.log_probs[: len(index)]
            entropy[index] = stats.entropy[: len(index)]
        self.world.all_reduce(log_probs, entropy)
        return log_probs, entropy

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """This rank's: rows by index; an empty one keeps the rank in step with the others."""
        budget = self.config.trainer.micro_batch_tokens
        return plan_micro_batches(lengths, budget, self.world.size)[self.world.rank]


def fingerprint(problems: Sequence[Problem]) -> str:
    """A short digest of the training problems in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.prompt_ids, problem.demonstration_ids)).encode())
        digest.update(problem.answer.encode())
    return digest.hexdigest()[:16]


def make_method(config: Config, tokenizer: PreTrainedTokenizerBase) -> Method:
    """The method `config.method.name`, with its section."""
    method = find_method(config.method.name)
    setting = Setting(
        seed=config.seed,
        num_steps=config.trainer.num_steps,
        prompts_per_step=config.trainer.prompts_per_step,
        prompts_per_update=config.trainer.prompts_per_update,
        group_size=config.rollout.group_size,
        max_response_length=config.rollout.max_response_length,
        mask_truncated=config.rollout.mask_truncated,
        eos_token_id=end_of_response_id(tokenizer),
        advantage_scale=config.method.advantage_scale,
        loss=config.loss,
    )
    return method(config.section(method), setting)


def takes_old_log_probs(loss: PolicyConfig | TokenLoss) -> bool:
    return not isinstance(loss, TokenLoss) or "old_log_probs" in loss.inputs
