"""Benchmarks during training: sampled by the trainer's engine, nothing kept but the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import require
from prefix_rft.config import Config
from prefix_rft.data_types import Problem
from prefix_rft.evaluate.chunks import sample_chunk
from prefix_rft.evaluate.results import SuiteResult
from prefix_rft.evaluate.suite_run import SuiteJob, prompt_of, suite_jobs
from prefix_rft.evaluate.suites import SuiteOptions, is_test
from prefix_rft.model import World
from prefix_rft.reward import Rewarder
from prefix_rft.rollout import RolloutEngine, max_sequence_length

HELD_OUT = "held_out"  # eval.select_by


@dataclass(frozen=True, kw_only=True)
class TrainingSuites:
    """The benchmarks `eval.suites` of a run; responses are no longer than the run's."""

    config: Config
    jobs: Sequence[SuiteJob]
    tokenizer: PreTrainedTokenizerBase

    def evaluate(self, engine: RolloutEngine, world: World) -> dict:
        """`num_problems/<suite>`, `avg@k/<suite>` and its interval. Collective; engine serving."""
        figures: dict = {}
        reward = replace(self.config.reward, function=None, functions={})
        for job in self.jobs:
            # One chunk a rank: nothing is kept for which their size would matter.
            total = len(job.sampling.problems) * job.sampling.num_samples
            sampling = replace(job.sampling, chunk_size=-(-total // world.size))
            own = range(world.rank, world.rank + 1) if world.rank < sampling.num_chunks else ()
            with Rewarder(reward, answer_pattern=job.suite.answer_pattern) as rewarder:
                parts = [
                    sample_chunk(
                        sampling, chunk, engine=engine, rewarder=rewarder, tokenizer=self.tokenizer
                    )
                    for chunk in own
                ]
            if not own and engine.is_collective:  # its peers wait for it
                engine.generate([], temperature=1.0, seed=0, weights_version=engine.weights_version)
            gathered = world.all_gather_object(parts)
            samples = [sample for rank in gathered for part in rank for sample in part]
            result = SuiteResult.of(job.suite, job.label, job.report, sampling, samples)
            figures[f"num_problems/{job.label}"] = result.num_problems
            name, estimate = next(iter(result.figures.items()))
            figures[f"{name}/{job.label}"] = estimate.value
            figures[f"{name}/{job.label}_ci95"] = estimate.ci95
        return figures


def training_suites(
    config: Config, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Problem]
) -> TrainingSuites:
    """The benchmarks of a run, with their problems.

    Raises:
        ConfigError: there is none of a name, or a model would be selected on a benchmark.
        DataError: one cannot be read.
    """
    eval_config = config.eval
    jobs: list[SuiteJob] = []
    if eval_config.suites is not None:
        options = SuiteOptions(
            names=eval_config.suites,
            names_key="eval.suites",
            data=eval_config.suite_data,
            data_key="eval.suite_data",
            limit=eval_config.suite_limit,
            num_samples=eval_config.suite_samples,
            max_tokens=eval_config.max_response_length or config.rollout.max_response_length,
        )
        # Of the engine, which may take less than the model.
        limit = max_sequence_length(config)
        jobs = suite_jobs(config, options, prompt_of(config, None), tokenizer, limit)
    sources = [problem.columns.get("data_source") for problem in held_out]
    on_test = eval_config.select_by not in (None, HELD_OUT) or (
        eval_config.select_by == HELD_OUT
        and is_test(config.data.eval_path or config.data.path, config.data.eval_split, sources)
    )
    require(
        not on_test or eval_config.select_on_test,
        "eval.select_by",
        "held-out problems that are no benchmark; what is selected on a benchmark is not measured "
        "by it (eval.select_on_test = true selects all the same)",
        eval_config.select_by,
    )
    return TrainingSuites(config=config, jobs=jobs, tokenizer=tokenizer)


def selection_metric(config: Config, results: dict) -> str:
    """The figure of an evaluation by which `eval.select_by` selects."""
    if config.eval.select_by == HELD_OUT:
        return f"avg@{config.eval.num_samples}"
    [name] = [
        name
        for name in results
        if name.startswith("avg@") and name.endswith(f"/{config.eval.select_by}")
    ]
    return name
