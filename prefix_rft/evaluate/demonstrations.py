"""`prefix-rft demonstrate`: a teacher's correct answers become demonstrations of a dataset."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefix_rft.checks import require
from prefix_rft.config import Config, model_at
from prefix_rft.data import FlatRows, load_problems
from prefix_rft.data_types import Problem
from prefix_rft.evaluate.chunks import (
    Sampling,
    claim,
    generate_chunk,
    grade_chunk,
    missing_chunks,
    read_samples,
    share_chunks,
    write_chunk,
)
from prefix_rft.evaluate.demonstration_file import Counts, Made, TeacherSample, finished, write
from prefix_rft.evaluate.suite_run import fingerprint
from prefix_rft.model import (
    World,
    load_model_config,
    load_policy,
    load_tokenizer,
    resolve_device,
    vocabulary_size,
)
from prefix_rft.reward import Rewarder, response_ids
from prefix_rft.rollout import make_engine, serving

KEEPS = ("shortest", "first", "all")


@dataclass(frozen=True, kw_only=True)
class DemonstrateOptions:
    """What is asked of the teacher, and what is kept."""

    out: Path  # parquet; samples are kept in a folder beside it
    num_samples: int = 4  # of each problem
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int | None = None  # of a response; None: rollout.max_response_length
    keep: str = "shortest"  # of the correct responses to a problem
    only_solved: bool = False
    chunk_size: int = 512

    def __post_init__(self) -> None:
        require(self.out.suffix == ".parquet", "--out", "a file *.parquet", str(self.out))
        require(self.num_samples >= 1, "--num-samples", "at least 1", self.num_samples)
        if self.num_samples > 1:
            expected = "above 0 for several samples of a problem"
            require(self.temperature > 0, "--temperature", expected, self.temperature)
        require(self.temperature >= 0, "--temperature", "at least 0", self.temperature)
        require(0 < self.top_p <= 1, "--top-p", "above 0, at most 1", self.top_p)
        at_least_2 = self.max_tokens is None or self.max_tokens >= 2
        require(at_least_2, "--max-tokens", "at least 2", self.max_tokens)
        require(self.keep in KEEPS, "--keep", f"one of {', '.join(KEEPS)}", self.keep)
        require(self.chunk_size >= 1, "--chunk-size", "at least 1", self.chunk_size)

    @property
    def folder(self) -> Path:
        """Where finished chunks of samples are."""
        return self.out.with_name(f"{self.out.name}.chunks")


def demonstrate(config: Config, model: str, options: DemonstrateOptions) -> Counts:
    """Answer the training problems of `config`, grade, and write `options.out`.

    Nothing is written where no problem is solved. What is there already is not made again. Under
    torchrun on all ranks, each with its part of the chunks.

    Args:
        model: a model folder, run folder or hub id.
    Raises:
        ConfigError: `options.out` or the samples beside it are of something else.
        DataError: see `load_problems`.
    """
    path = model_at(model)
    text_config = load_model_config(config.model, path).get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    with World(config.sharding, resolve_device(config.model)) as world:
        tokenizer = load_tokenizer(path, config.model.chat_template)
        data = load_problems(config, tokenizer)
        for report in data.reports if world.is_main else ():
            print(report, file=sys.stderr)
        held_out = data.held_out if config.data.eval_path is None else []
        asked = [p for p in data.train if limit is None or len(p.prompt_ids) + 2 <= limit]
        require(bool(asked), "model", "room for the prompt of some problem", f"{limit} positions")
        sampling = _sampling(config, asked, limit, options)
        flat = FlatRows(data.train, config.data.columns)
        identity = _identity(config, path, sampling)
        file_identity = identity | {"keep": options.keep, "only_solved": options.only_solved}
        file_identity["rows"] = _digest(flat.row(p, None) for p in [*data.train, *held_out])
        made = world.broadcast(lambda: finished(options.out, file_identity))
        if made is not None:
            if world.is_main:
                print(f"{options.out} is there already: nothing to do", file=sys.stderr)
            return made
        world.broadcast(lambda: claim(options.folder, identity))
        missing = world.broadcast(lambda: missing_chunks(options.folder, sampling))
        if missing:
            fitting = _within(config, limit, sampling.max_tokens)
            _sample(fitting, path, sampling, missing, options.folder, tokenizer, world)
        world.broadcast(lambda: None)  # every rank has written its chunks

        def finish() -> Counts:
            made = Made(
                flat,
                data.train,
                held_out,
                read_samples(options.folder, sampling, TeacherSample),
                keep=options.keep,
                only_solved=options.only_solved,
            )
            counts = made.counts(config, tokenizer, num_unasked=len(data.train) - len(asked))
            if counts.num_kept:
                write(options.out, made.rows, file_identity, counts)
            return counts

        return world.broadcast(finish)


def _within(config: Config, limit: int | None, max_tokens: int) -> Config:
    """`config` with the lengths that an engine needs, within the teacher's positions."""
    prompt = config.data.max_prompt_tokens
    if limit is not None and prompt + max_tokens > limit:  # requests are cut one by one
        prompt = min(prompt, limit - 2)
        max_tokens = limit - prompt
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=prompt),
        rollout=replace(config.rollout, max_response_length=max_tokens),
        eval=replace(config.eval, max_response_length=None),
    )


def _sampling(
    config: Config, problems: Sequence[Problem], limit: int | None, options: DemonstrateOptions
) -> Sampling:
    return Sampling(
        problems=problems,
        num_samples=options.num_samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens or config.rollout.max_response_length,
        position_limit=limit,
        answer_pattern=config.data.answer_pattern,
        chunk_size=options.chunk_size,
        seed=config.seed,
    )


def _identity(config: Config, path: str, sampling: Sampling) -> dict[str, Any]:
    """What the samples follow from."""
    return {
        "model": fingerprint(path),
        "dtype": config.model.dtype,
        "engine": config.rollout.engine,
        "seed": config.seed,
        "problems": _digest((p.prompt_ids, p.answer) for p in sampling.problems),
        "num_samples": sampling.num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "chunk_size": sampling.chunk_size,
        "stop": [*config.rollout.stop_token_ids, *config.rollout.stop],
        "answer_pattern": sampling.answer_pattern,
        "reward": config.reward.weights,
        "correct_reward": config.reward.correct_reward,
    }


def _digest(items: Any) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


def _sample(
    config: Config,
    path: str,
    sampling: Sampling,
    chunks: Sequence[int],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> None:
    with ExitStack() as stack:
        policy = load_policy(config, path, vocab_size=vocabulary_size(tokenizer), world=world)
        engine = make_engine(config, policy, tokenizer)
        stack.callback(engine.close)
        rewarder = stack.enter_context(Rewarder(config.reward, config.data.answer_pattern))
        stack.enter_context(serving(engine, policy, version=0))

        def make(chunk: int) -> None:
            completions = generate_chunk(sampling, chunk, engine=engine)
            samples = grade_chunk(
                sampling, chunk, completions, rewarder=rewarder, tokenizer=tokenizer
            )
            kept = [
                TeacherSample(**asdict(sample), response_ids=response_ids(tokenizer, completion))
                for sample, completion in zip(samples, completions, strict=True)
            ]
            write_chunk(folder, chunk, kept)

        total = sampling.num_chunks
        share_chunks(
            chunks, make, label="demonstrate", num_chunks=total, engine=engine, world=world
        )
