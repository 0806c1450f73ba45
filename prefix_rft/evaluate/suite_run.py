"""Benchmarks for a model, from the problems to samples on disk and figures over them.

Ranks share the chunks of each benchmark, and the weights as in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import require
from prefix_rft.config import CONFIG_FILE, Config, load_config, model_at, run_folder_of
from prefix_rft.data import load_rows, problems_from_rows
from prefix_rft.evaluate.chunks import (
    Sampling,
    claim,
    missing_chunks,
    read_samples,
    sample_chunk,
    share_chunks,
    write_chunk,
)
from prefix_rft.evaluate.page import write_page
from prefix_rft.evaluate.prompts import NONE, Prompt, find_prompt
from prefix_rft.evaluate.results import SuiteResult, write_results
from prefix_rft.evaluate.suites import Suite, SuiteOptions, evenly, rows_of
from prefix_rft.model import World, load_model_config, load_policy, load_tokenizer, resolve_device
from prefix_rft.model import vocabulary_size as vocabulary_size_of
from prefix_rft.reward import Rewarder, grader_info
from prefix_rft.rollout import RolloutEngine, make_engine, serving

MAX_PROMPT_TOKENS = 4096  # problems with a longer prompt are left out, and told
_EDGE_BYTES = 2**20  # of each end of a weight file that a fingerprint reads
_PACKAGES = ("prefix-rft", "torch", "transformers", "vllm", "math-verify")


def evaluate_suites(
    config: Config, model: str, options: SuiteOptions, folder: Path
) -> list[SuiteResult]:
    """Sample and grade what `folder` does not have yet; returns the figures of each suite.

    Writes results.json, index.html and a samples file for each suite. Under torchrun on all ranks.

    Args:
        model: a model folder, run folder or hub id.
    Raises:
        ConfigError: `folder` has samples of another model or protocol; see also `rows_of`.
        DataError: a suite cannot be read, or has no usable problem.
    """
    config = _for_model(config, model, options)
    path = model_at(model)
    text_config = load_model_config(config.model, path).get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    with World(config.sharding, resolve_device(config.model)) as world:
        tokenizer = load_tokenizer(path, config.model.chat_template)
        prompt = prompt_of(config, options.prompt)
        jobs = suite_jobs(config, options, prompt, tokenizer, limit)
        identity = {"model": fingerprint(path), "dtype": config.model.dtype, "seed": config.seed}
        identity |= {"engine": config.rollout.engine, "grader_rules": grader_info()["rules"]}
        world.broadcast(
            lambda: [claim(job.folder(folder), identity | job.identity) for job in jobs]
        )
        missing = world.broadcast(
            lambda: [missing_chunks(job.folder(folder), job.sampling) for job in jobs]
        )
        if any(missing):
            with ExitStack() as stack:
                policy = load_policy(
                    config, path, vocab_size=vocabulary_size_of(tokenizer), world=world
                )
                engine = make_engine(config, policy, tokenizer)
                stack.callback(engine.close)
                stack.enter_context(serving(engine, policy, version=0))
                for job, chunks in zip(jobs, missing, strict=True):
                    _sample(config, job, chunks, folder, engine, tokenizer, world)
        world.broadcast(lambda: None)  # every rank has written its chunks
        results = [
            SuiteResult.of(
                job.suite,
                job.label,
                job.report,
                job.sampling,
                samples,
                pass_at=options.pass_at,
            )
            for job in jobs
            if (samples := list(read_samples(job.folder(folder), job.sampling)))
        ]
        if world.is_main:
            header = identity | {
                "path": model,
                "prompt": {"name": prompt.name, "system": prompt.system, "whole": prompt.whole},
                "versions": _versions(),
                "grader": grader_info(),
            }
            write_results(folder, header, results, [job.folder(folder) for job in jobs], options)
            write_page(folder, f"{model} on {options.names}", results, header)
        return results


@dataclass(frozen=True, kw_only=True)
class SuiteJob:
    """One suite at one temperature."""

    suite: Suite
    label: str  # the suite, with `_greedy` for temperature 0
    sampling: Sampling
    prompt: Prompt
    report: str  # what the rows came to

    def folder(self, root: Path) -> Path:
        return root / "chunks" / self.label

    @property
    def identity(self) -> dict:
        """What the samples follow from, beside the model."""
        sampling = self.sampling
        problems = hashlib.sha256()
        for problem in sampling.problems:
            problems.update(repr((problem.prompt_ids, problem.answer)).encode())
        return {
            "suite": self.label,
            "prompt": self.prompt.name,
            "problems": problems.hexdigest()[:16],
            "num_samples": sampling.num_samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "chunk_size": sampling.chunk_size,
        }


def suite_jobs(
    config: Config,
    options: SuiteOptions,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> list[SuiteJob]:
    """What the suites asked for take, with their problems as the tokenizer has them.

    Args:
        limit: tokens of prompt and response that the model can take; None: any.
    """
    suites = options.suites()
    return [
        job
        for suite in suites
        for job in _jobs(config, suite, len(suites), options, prompt, tokenizer, limit)
    ]


def _jobs(
    config: Config,
    suite: Suite,
    num_suites: int,
    options: SuiteOptions,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> list[SuiteJob]:
    key = options.data_key
    rows = (
        load_rows(suite.hub, suite.split, key=options.names_key)
        if options.data is None
        else rows_of(suite, load_rows(options.data, suite.split, key=key), key, num_suites)
    )
    longest = MAX_PROMPT_TOKENS if limit is None else min(MAX_PROMPT_TOKENS, limit - 2)
    data = replace(
        config.data,
        max_prompt_tokens=longest,
        system_prompt=prompt.system,
        columns={},
        eval_columns={},
        strict=False,
    )
    problems, report = problems_from_rows(
        rows,
        data,
        prompt.tokenizer(tokenizer),
        max_response_length=suite.max_tokens,
        held_out=True,
        source=suite.name,
    )
    sampled = Sampling(
        problems=evenly(problems, options.limit),
        num_samples=suite.num_samples,
        temperature=suite.temperature,
        top_p=suite.top_p,
        max_tokens=suite.max_tokens,
        position_limit=limit,
        answer_pattern=suite.answer_pattern,
        chunk_size=options.chunk_size,
        seed=config.seed,
    )
    common = {"suite": suite, "prompt": prompt, "report": str(report)}
    jobs = [SuiteJob(label=suite.name, sampling=sampled, **common)]
    if suite.greedy:
        greedy = replace(sampled, num_samples=1, temperature=0.0, top_p=1.0)
        jobs.append(SuiteJob(label=f"{suite.name}_greedy", sampling=greedy, **common))
    return jobs


def _sample(
    config: Config,
    job: SuiteJob,
    chunks: Sequence[int],
    folder: Path,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> None:
    reward = replace(config.reward, function=None, functions={})
    with Rewarder(reward, answer_pattern=job.suite.answer_pattern) as rewarder:

        def make(chunk: int) -> None:
            samples = sample_chunk(
                job.sampling, chunk, engine=engine, rewarder=rewarder, tokenizer=tokenizer
            )
            write_chunk(job.folder(folder), chunk, samples)

        total = job.sampling.num_chunks
        share_chunks(chunks, make, label=job.label, num_chunks=total, engine=engine, world=world)


def _for_model(config: Config, model: str, options: SuiteOptions) -> Config:
    """`config` with what the run of `model` knows of its model and prompt, and with room."""
    if (run_dir := run_folder_of(model)) is not None:
        run = load_config(run_dir / CONFIG_FILE)
        config = replace(
            config,
            data=replace(config.data, system_prompt=run.data.system_prompt),
            model=replace(
                config.model,
                chat_template=run.model.chat_template,
                rope_theta=run.model.rope_theta,
                max_position_embeddings=run.model.max_position_embeddings,
            ),
        )
    prompt, response = MAX_PROMPT_TOKENS, max(suite.max_tokens for suite in options.suites())
    if (positions := config.model.max_position_embeddings) is not None:
        prompt = min(prompt, positions // 2)
        response = max(2, min(response, positions - prompt))
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=prompt),
        rollout=replace(config.rollout, max_response_length=response),
        eval=replace(config.eval, max_response_length=None, group_by=None),
    )


def prompt_of(config: Config, name: str | None) -> Prompt:
    """The prompt of that name; None: that of the run."""
    if name is not None:
        return find_prompt(name)
    system = config.data.system_prompt
    return Prompt(name=NONE if system is None else "the run's", system=system)


def fingerprint(path: str) -> dict[str, str]:
    """What tells a model from another: its path, and a digest of its files where it is a folder."""
    folder = Path(path)
    if not folder.is_dir():
        return {"hub_id": path}
    digest = hashlib.sha256()
    names = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer.json")
    files = sorted(file for name in names for file in folder.glob(name))
    require(bool(files), "model", "a folder with weights, or a hub id", path)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES))
            digest.update(stream.read(_EDGE_BYTES))
    return {"sha256_of_edges": digest.hexdigest()[:16]}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
