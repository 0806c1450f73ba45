"""One training step, top to bottom: generate, score, take advantages, select, update."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from prefix_rft.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from prefix_rft.config import Config, OptimizerConfig
from prefix_rft.data import batch_indices
from prefix_rft.data_types import Group, MiniBatch, Problem, Rollout, TrainBatch, Update
from prefix_rft.interrupt import Interrupt
from prefix_rft.ledger import Ledger
from prefix_rft.measures import describe_group, measure_rollouts, measure_updates
from prefix_rft.methods import make_method
from prefix_rft.model import Policy
from prefix_rft.packing import pack, plan_micro_batches, take_rows, token_index
from prefix_rft.reward import Rewarder
from prefix_rft.rollout import RolloutEngine


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
    ) -> None:
        self.config = config
        self.policy = policy
        self.tokenizer = tokenizer
        self.engine = engine
        self.rewarder = rewarder
        self.problems = problems
        self.method = make_method(config)
        self.updates_per_step = config.trainer.prompts_per_step // config.trainer.prompts_per_update
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.step_index = 0  # steps done

    def train_step(self, interrupt: Interrupt) -> tuple[dict[str, float], dict]:
        """Advance by one step; a signal that comes before the first update abandons it.

        Returns:
            the step's metrics by name, and one group of rollouts described for the report.
        """
        ledger = Ledger()
        with ledger.timer("time/step_s"):
            with interrupt.abandonable():
                groups = self.rollouts(ledger)
                mini_batches = self.mini_batches(groups)
                if self.updates_per_step > 1:
                    mini_batches = [self.with_old_log_probs(each, ledger) for each in mini_batches]
            lr = learning_rate(
                self.step_index, self.config.optimizer, self.config.trainer.num_steps
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            ledger.add("optim/lr", lr)
            updates = [self.update(mini_batch, ledger) for mini_batch in mini_batches]
            self.step_index += 1
            self.engine.update_weights(self.policy.model, version=self.step_index)
        measure_rollouts(ledger, groups, self.tokenizer, self.rewarder.has_answer)
        measure_updates(ledger, groups, updates)
        metrics = ledger.result()
        num_tokens, seconds = metrics["rollout/generated_tokens_sum"], metrics["time/step_s"]
        metrics["throughput/tokens_per_s"] = num_tokens / seconds
        return metrics, describe_group(groups, updates, self.tokenizer)

    def save(self, run_dir: Path) -> int:
        """Write a checkpoint; returns the steps done in it."""
        state = TrainerState(
            step=self.step_index,
            data_fingerprint=fingerprint(self.problems),
        )
        keep = self.config.trainer.keep_checkpoints
        save_checkpoint(run_dir, self.policy.model, self.optimizer, state, keep=keep)
        return self.step_index

    def restore(self, checkpoint: Path) -> None:
        """Take up the weights, the optimizer and the step of a checkpoint."""
        state = load_checkpoint(
            checkpoint,
            self.policy.model,
            self.optimizer,
            data_fingerprint=fingerprint(self.problems),
        )
        self.step_index = state.step
        self.engine.update_weights(self.policy.model, version=self.step_index)

    def rollouts(self, ledger: Ledger) -> list[Group]:
        """Generate and score the groups of this step."""
        config, step = self.config, self.step_index
        for name, value in self.method.schedule(step).items():
            ledger.add(name, value)
        order = batch_indices(
            len(self.problems), config.trainer.prompts_per_step, step, config.seed
        )
        planned = [
            (self.problems[i], request)
            for i in order
            for request in self.method.plan_group(self.problems[i], step)
        ]
        with ledger.timer("time/generate_s"):
            completions = self.engine.generate(
                [request for _, request in planned],
                temperature=config.rollout.temperature,
                seed=(config.seed << 32) + step,
                weights_version=step,
            )
        with ledger.timer("time/reward_s"):
            texts = [
                self.tokenizer.decode(r.prefix_ids + c.token_ids, skip_special_tokens=True)
                for (_, r), c in zip(planned, completions, strict=True)
            ]
            scores = self.rewarder.score(texts, [problem for problem, _ in planned])
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
        return [
            Group(problem=self.problems[i], rollouts=tuple(rollouts[k * size : (k + 1) * size]))
            for k, i in enumerate(order)
        ]

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

    def with_old_log_probs(self, mini_batch: MiniBatch, ledger: Ledger) -> MiniBatch:
        """The log-probs of the policy that generated, for updates that move away from it."""
        batch = mini_batch.batch
        with ledger.timer("time/old_policy_s"):
            log_probs, _ = self.token_stats(batch, range(len(batch.lengths)))
        return replace(mini_batch, batch=replace(batch, old_log_probs=log_probs))

    def update(self, mini_batch: MiniBatch, ledger: Ledger) -> Update:
        """Select prefix tokens, sum the gradient over micro-batches, take one optimizer step.

        A gradient that is not finite is dropped, and counted.
        """
        config, batch = self.config, mini_batch.batch
        with ledger.timer("time/old_policy_s"):
            hybrid = [i for i, row in enumerate(mini_batch.rows) if row.rollout.is_hybrid]
            _, entropy = self.token_stats(batch, hybrid)
            selected = self.method.select(entropy, batch, seed=self.step_index)
            batch = replace(batch, selected_mask=selected)
        with ledger.timer("time/update_s"):
            normalizer = mini_batch.num_rollouts * config.rollout.max_response_length
            log_probs = torch.zeros_like(entropy)
            losses = []
            for rows in plan_micro_batches(batch.lengths, config.trainer.micro_batch_tokens):
                out = self.method.loss(self.policy, take_rows(batch, rows), normalizer)
                out.loss.backward()
                index = token_index(batch, rows)
                log_probs[index] = out.log_probs
                entropy[index] = torch.where(batch.prefix_mask[index], entropy[index], out.entropy)
                losses.append(out)
            parameters = self.policy.model.parameters()
            grad_norm = clip_grad_norm_(parameters, config.optimizer.max_grad_norm).item()
            if math.isfinite(grad_norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return Update(
            rows=mini_batch.rows,
            batch=batch,
            log_probs=log_probs,
            entropy=entropy,
            loss=sum(out.loss.detach() for out in losses),
            sums={name: sum(out.metrics[name] for out in losses) for name in losses[0].metrics},
            grad_norm=grad_norm,
        )

    def token_stats(
        self, batch: TrainBatch, rows: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropy of `rows` under the current policy, [T] each; 0 on other rows."""
        log_probs = torch.zeros_like(batch.advantages)
        entropy = torch.zeros_like(batch.advantages)
        lengths = [batch.lengths[row] for row in rows]
        for picks in plan_micro_batches(lengths, self.config.trainer.micro_batch_tokens):
            part = [rows[pick] for pick in picks]
            index = token_index(batch, part)
            stats = self.policy.token_stats(take_rows(batch, part))
            log_probs[index], entropy[index] = stats.log_probs, stats.entropy
        return log_probs, entropy


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Of `step` (from 0): a linear warm-up, then constant, or falling to 0 at `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fingerprint(problems: Sequence[Problem]) -> str:
    """A short digest of the training problems in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.prompt_ids, problem.demonstration_ids)).encode())
        digest.update(problem.answer.encode())
    return digest.hexdigest()[:16]
