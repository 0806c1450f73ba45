"""One training step, top to bottom: generate, score, take advantages, select, update.

Each rank generates and scores its share of the prompts, then tells the others: from there on every
rank knows the whole mini-batch, decides the same, and computes its share of the micro-batches.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from rft_kernels import PolicyConfig
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from prefix_rft.config import Config
from prefix_rft.data import batch_indices
from prefix_rft.data_types import (
    Completion,
    Group,
    MiniBatch,
    Problem,
    Rollout,
    RolloutRequest,
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
from prefix_rft.reward import Rewarder, Scoring, response_text
from prefix_rft.rollout import RolloutEngine, serving
from prefix_rft.train.checkpoint import CheckpointWriter, TrainerState, load_checkpoint
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from prefix_rft.train.packing import dummy_batch, pack, plan_micro_batches, take_rows, token_index

POLICY = "policy"  # the optimizer that every method has
NOTHING_GENERATED = Completion(token_ids=(), log_probs=(), finish_reason="stop")


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
        self.updates_per_step = config.trainer.prompts_per_step // config.trainer.prompts_per_update
        self.optimizer_configs = {POLICY: config.optimizer} | {
            name: replace(config.optimizer, **changes)
            for name, changes in self.method.optimizers.items()
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
        config, step = self.config, self.step_index
        for name, value in self.method.schedule(step).items():
            step_metrics.add(name, value)
        order = batch_indices(
            len(self.problems), config.trainer.prompts_per_step, step, config.seed
        )
        problems = [self.problems[i] for i in order]
        plans = [self.method.plan_group(problem, step) for problem in problems]
        if not any(plans):
            return [Group(problem=problem, rollouts=()) for problem in problems]
        with ExitStack() as stack:
            with step_metrics.phase("push"):
                stack.enter_context(serving(self.engine, self.policy, version=step))
            with interrupt.cancellable(at_once=not self.engine.is_collective):
                planned = list(zip(problems, plans, strict=True))
                shard = self.generate(self.world.shard(planned), step_metrics)
        with step_metrics.phase("wait"):  # for the slowest rank
            rollouts = self.world.all_gather(shard)
        if config.reward.allow_none:
            num_planned, num_scored = sum(map(len, plans)), sum(map(len, rollouts))
            step_metrics.mean("grader/no_reward_frac", num_planned - num_scored, num_planned)
        return [
            Group(problem=problem, rollouts=rollouts)
            for problem, rollouts in zip(problems, rollouts, strict=True)
        ]

    def generate(
        self,
        planned: Sequence[tuple[Problem, list[RolloutRequest]]],
        step_metrics: StepMetrics,
    ) -> list[tuple[Rollout, ...]]:
        """The rollouts of each group that is planned, without those that got no reward."""
        config, step = self.config, self.step_index
        requests = [request for _, plan in planned for request in plan]
        problems = [problem for problem, plan in planned for _ in plan]
        completions = [NOTHING_GENERATED] * len(requests)
        texts = [""] * len(requests)
        open_requests = [i for i, request in enumerate(requests) if request.max_new_tokens]
        with Scoring(self.rewarder, problems) as scoring:

            def score(index: int, completion: Completion) -> None:
                prefix_ids = requests[index].prefix_ids
                texts[index] = response_text(self.tokenizer, completion, prefix_ids)
                scoring.add(index, texts[index])

            for i, request in enumerate(requests):
                if not request.max_new_tokens:
                    score(i, NOTHING_GENERATED)
            with step_metrics.phase("generate"):
                generated = self.engine.generate(
                    [requests[i] for i in open_requests],
                    temperature=config.rollout.temperature,
                    seed=(config.seed << 32) + step * self.world.size + self.world.rank,
                    weights_version=step,
                    on_done=lambda k, completion: score(open_requests[k], completion),
                )
            for i, completion in zip(open_requests, generated, strict=True):
                completions[i] = completion
            with step_metrics.phase("reward"):  # waits for what is still being graded
                scores = scoring.scores()
        rollouts = iter(
            None
            if score.reward is None
            else Rollout(
                prompt_ids=request.prompt_ids,
                response_ids=request.prefix_ids + completion.token_ids,
                prefix_length=len(request.prefix_ids),
                rollout_log_probs=completion.log_probs,
                finish_reason=completion.finish_reason,
                text=text,
                reward=score.reward,
                status=score.status,
            )
            for request, completion, text, score in zip(
                requests, completions, texts, scores, strict=True
            )
        )
        return [tuple(filter(None, islice(rollouts, len(plan)))) for _, plan in planned]

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

        A gradient that is not finite is dropped, and counted.

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
            grad_norm = self.optimizer_step(mini_batch.optimizer)
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
        )

    def optimizer_step(self, name: str) -> float:
        """Clip the gradient and apply it, if it is finite; its norm before."""
        config, optimizer = self.optimizer_configs[name], self.optimizers[name]
        norm = clip_grad_norm_(self.policy.model.parameters(), config.max_grad_norm)
        norm = full_tensor(norm).item()
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

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
        eos_token_id=end_of_response_id(tokenizer),
        loss=config.loss,
    )
    return method(config.section(method), setting)


def takes_old_log_probs(loss: PolicyConfig | TokenLoss) -> bool:
    return not isinstance(loss, TokenLoss) or "old_log_probs" in loss.inputs
