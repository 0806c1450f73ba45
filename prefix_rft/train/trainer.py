"""One training step, top to bottom: generate, score, take advantages, select, update.

Each rank generates and scores its share of the prompts, then tells the others: from there on every
rank knows the whole mini-batch, decides the same, and computes its share of the micro-batches.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from prefix_rft.config import Config
from prefix_rft.data import batch_indices
from prefix_rft.data_types import Completion, Group, MiniBatch, Problem, Rollout, TrainBatch, Update
from prefix_rft.methods import make_method
from prefix_rft.metrics import (
    StepMetrics,
    check_gap,
    describe_group,
    log_prob_gap,
    measure_rollouts,
    measure_updates,
    throughput,
)
from prefix_rft.model import Policy, World, full_tensor
from prefix_rft.reward import Rewarder, Scoring
from prefix_rft.rollout import RolloutEngine, serving
from prefix_rft.train.checkpoint import CheckpointWriter, TrainerState, load_checkpoint
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from prefix_rft.train.packing import dummy_batch, pack, plan_micro_batches, take_rows, token_index


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
        self.method = make_method(config)
        self.updates_per_step = config.trainer.prompts_per_step // config.trainer.prompts_per_update
        self.optimizer = make_optimizer(policy.parameters(), config.optimizer, policy.device)
        self.step_index = 0  # steps done

    def train_step(self, interrupt: Interrupt) -> tuple[dict[str, float], dict]:
        """Advance by one step; a signal that comes before the first update cancels it.

        Returns:
            the step's metrics by name, and one group of rollouts described for the report.
        """
        step_metrics = StepMetrics()
        with step_metrics.phase("step"):
            groups = self.rollouts(step_metrics, interrupt)
            mini_batches = self.mini_batches(groups)
            if self.updates_per_step > 1:
                mini_batches = [
                    self.with_old_log_probs(each, step_metrics) for each in mini_batches
                ]
            lr = learning_rate(
                self.step_index, self.config.optimizer, self.config.trainer.num_steps
            )
            set_learning_rate(self.optimizer, lr)
            step_metrics.add("optim/lr", lr)
            updates = [self.update(mini_batch, step_metrics) for mini_batch in mini_batches]
            self.step_index += 1
        measure_rollouts(step_metrics, groups, self.tokenizer, self.rewarder.has_answer)
        measure_updates(step_metrics, groups, updates)
        metrics = step_metrics.result()
        metrics |= throughput(metrics, updates)
        return metrics, describe_group(groups, updates, self.tokenizer)

    def save(self, checkpoints: CheckpointWriter) -> int:
        """Write a checkpoint; returns the steps done in it. Collective."""
        state = TrainerState(step=self.step_index, data_fingerprint=fingerprint(self.problems))
        checkpoints.save(self.policy.model, self.optimizer, state)
        return self.step_index

    def restore(self, checkpoint: Path) -> None:
        """Take up the weights, the optimizer and the step of a checkpoint. Collective."""
        state = load_checkpoint(
            checkpoint,
            self.policy.model,
            self.optimizer,
            data_fingerprint=fingerprint(self.problems),
            world=self.world,
        )
        self.step_index = state.step

    def rollouts(self, step_metrics: StepMetrics, interrupt: Interrupt) -> list[Group]:
        """The groups of this step, generated and scored."""
        config, step = self.config, self.step_index
        for name, value in self.method.schedule(step).items():
            step_metrics.add(name, value)
        order = batch_indices(
            len(self.problems), config.trainer.prompts_per_step, step, config.seed
        )
        with ExitStack() as stack:
            with step_metrics.phase("push"):
                stack.enter_context(serving(self.engine, self.policy, version=step))
            with interrupt.cancellable(at_once=not self.engine.is_collective):
                share = self.generate(
                    [self.problems[i] for i in self.world.shard(order)], step_metrics
                )
        with step_metrics.phase("wait"):  # for the slowest rank
            merged = self.world.all_gather(share)
        return [
            Group(problem=self.problems[i], rollouts=rollouts)
            for i, rollouts in zip(order, merged, strict=True)
        ]

    def generate(
        self, problems: Sequence[Problem], step_metrics: StepMetrics
    ) -> list[tuple[Rollout, ...]]:
        """The scored rollouts of one group for each of `problems`."""
        config, step = self.config, self.step_index
        planned = [
            (problem, request)
            for problem in problems
            for request in self.method.plan_group(problem, step)
        ]
        texts = [""] * len(planned)
        with Scoring(self.rewarder, [problem for problem, _ in planned]) as scoring:

            def score(index: int, completion: Completion) -> None:
                ids = planned[index][1].prefix_ids + completion.token_ids
                texts[index] = self.tokenizer.decode(ids, skip_special_tokens=True)
                scoring.add(index, texts[index])

            with step_metrics.phase("generate"):
                completions = self.engine.generate(
                    [request for _, request in planned],
                    temperature=config.rollout.temperature,
                    seed=(config.seed << 32) + step * self.world.size + self.world.rank,
                    weights_version=step,
                    on_done=score,
                )
            with step_metrics.phase("reward"):  # of what is still to be graded
                scores = scoring.scores()
        rollouts = [
            Rollout(
                prompt_ids=request.prompt_ids,
                response_ids=request.prefix_ids + completion.token_ids,
                prefix_length=len(request.prefix_ids),
                rollout_log_probs=completion.log_probs,
                finish_reason=completion.finish_reason,
                text=text,
                reward=score.reward,
                status=score.status,
            )
            for (_, request), completion, text, score in zip(
                planned, completions, texts, scores, strict=True
            )
        ]
        size = config.rollout.group_size
        return [tuple(rollouts[k : k + size]) for k in range(0, len(rollouts), size)]

    def mini_batches(self, groups: Sequence[Group]) -> list[MiniBatch]:
        """`prompts_per_update` groups each; one in which no rollout has a gradient is left out."""
        size = self.config.trainer.prompts_per_update
        mini_batches = []
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            rows = [row for group in part for row in self.method.train_rows(group)]
            if rows:
                batch = pack(rows, device=self.policy.device, dtype=self.policy.stats_dtype)
                num_rollouts = sum(len(group.rollouts) for group in part)
                mini_batches.append(MiniBatch(rows=rows, batch=batch, num_rollouts=num_rollouts))
        return mini_batches

    def with_old_log_probs(self, mini_batch: MiniBatch, step_metrics: StepMetrics) -> MiniBatch:
        """The log-probs of the policy that generated, for updates that move away from it."""
        batch = mini_batch.batch
        with step_metrics.phase("old_policy"):
            log_probs, _ = self.token_stats(batch, range(len(batch.lengths)))
        check_gap(log_prob_gap(batch, log_probs), self.config.rollout.max_log_prob_gap)
        return replace(mini_batch, batch=replace(batch, old_log_probs=log_probs))

    def update(self, mini_batch: MiniBatch, step_metrics: StepMetrics) -> Update:
        """Select prefix tokens, sum the gradient over micro-batches, take one optimizer step.

        A gradient that is not finite is dropped, and counted.

        Raises:
            LogProbGapError: the engine sampled from something else; nothing was updated.
        """
        config, batch = self.config, mini_batch.batch
        with step_metrics.phase("old_policy"):
            hybrid = [i for i, row in enumerate(mini_batch.rows) if row.rollout.is_hybrid]
            _, entropy = self.token_stats(batch, hybrid)
            selected = self.method.select(entropy, batch, seed=self.step_index)
            batch = replace(batch, selected_mask=selected)
        with step_metrics.phase("update"):
            normalizer = mini_batch.num_rollouts * config.rollout.max_response_length
            # On the host, for the loss to know how many rows it computes: one wait an update.
            is_active = (batch.response_mask & (~batch.prefix_mask | selected)).cpu()
            log_probs, active_entropy = torch.zeros_like(entropy), torch.zeros_like(entropy)
            losses = []
            for rows in self.micro_batches(batch.lengths):
                index = token_index(batch, rows)
                part = take_rows(batch, rows) if rows else dummy_batch(batch)
                active_rows = is_active[index.cpu()].nonzero()[:, 0].to(index.device)
                part = replace(part, active_rows=active_rows)
                out = self.method.loss(self.policy, part, normalizer)
                out.loss.backward()
                log_probs[index] = out.log_probs[: len(index)]
                active_entropy[index] = out.entropy[: len(index)]
                losses.append(out.metrics | {"loss": out.loss.detach()})
            sums = {name: sum(each[name] for each in losses) for name in losses[0]}
            del sums["ratio_max"]  # no sum
            self.world.all_reduce(log_probs, active_entropy, *sums.values())
            if batch.old_log_probs is None:
                check_gap(log_prob_gap(batch, log_probs), config.rollout.max_log_prob_gap)
            parameters = self.policy.model.parameters()
            grad_norm = clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
            grad_norm = full_tensor(grad_norm).item()
            if math.isfinite(grad_norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return Update(
            rows=mini_batch.rows,
            batch=batch,
            log_probs=log_probs,
            entropy=torch.where(batch.prefix_mask, entropy, active_entropy),
            loss=sums.pop("loss"),
            sums=sums,
            grad_norm=grad_norm,
        )

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
