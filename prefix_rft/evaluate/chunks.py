"""Sampling in chunks that are kept on disk: what is done is never generated again.

A chunk is a fixed range of a suite's samples with a seed of its own. Its file appears once it is
whole, so an interrupted evaluation goes on with the numbers that it would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prefix_rft.checks import ConfigError
from prefix_rft.data_types import Completion, Problem, RolloutRequest
from prefix_rft.reward import Rewarder, extract_answer, response_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefix_rft.model import World
    from prefix_rft.rollout import RolloutEngine

IDENTITY_FILE = "identity.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A graded response to a problem; the fields of a line of a samples file."""

    index: int  # row of the problem in its source
    sample: int  # from 0, of the problem
    prompt: str
    response: str
    extracted: str | None  # what was graded
    answer: str  # gold
    status: str
    num_tokens: int
    finish_reason: str
    has_thought: bool  # whether the text after </think> was graded, and not the whole


AnySample = TypeVar("AnySample", bound=Sample)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The samples of one suite at one temperature."""

    problems: Sequence[Problem]
    num_samples: int  # of each problem
    temperature: float
    top_p: float
    max_tokens: int
    position_limit: int | None  # tokens of prompt and response together
    answer_pattern: str
    chunk_size: int
    seed: int

    @property
    def num_chunks(self) -> int:
        return -(-len(self.problems) * self.num_samples // self.chunk_size)

    def picks(self, chunk: int) -> list[tuple[Problem, int]]:
        """The problems of a chunk's samples, with the number of each sample."""
        total = len(self.problems) * self.num_samples
        start = chunk * self.chunk_size
        return [
            (self.problems[i // self.num_samples], i % self.num_samples)
            for i in range(start, min(start + self.chunk_size, total))
        ]

    def request(self, problem: Problem) -> RolloutRequest:
        limit = self.max_tokens
        if self.position_limit is not None:
            limit = min(limit, self.position_limit - len(problem.prompt_ids))
        return RolloutRequest(prompt_ids=problem.prompt_ids, max_new_tokens=limit)

    @property
    def num_cut(self) -> int:
        """Problems whose responses have less than `max_tokens`."""
        requests = map(self.request, self.problems)
        return sum(request.max_new_tokens < self.max_tokens for request in requests)

    def chunk_seed(self, chunk: int) -> int:
        digest = hashlib.sha256(f"{self.seed} {self.temperature} {chunk}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1


def claim(folder: Path, identity: dict) -> None:
    """Make `folder` that of samples which follow from `identity`, or find it so.

    Raises:
        ConfigError: it holds samples of something else.
    """
    file = folder / IDENTITY_FILE
    if file.is_file():
        before = json.loads(file.read_text())
        now = json.loads(json.dumps(identity))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"--out: {folder} has samples with {key} {before.get(key)!r}, got "
                    f"{now.get(key)!r}: choose another folder, or delete it"
                )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(identity, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def chunk_file(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:05d}.jsonl"


def missing_chunks(folder: Path, sampling: Sampling) -> list[int]:
    chunks = range(sampling.num_chunks)
    return [chunk for chunk in chunks if not chunk_file(folder, chunk).is_file()]


def sample_chunk(
    sampling: Sampling,
    chunk: int,
    *,
    engine: RolloutEngine,
    rewarder: Rewarder,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Sample]:
    """Generate and grade one chunk."""
    completions = generate_chunk(sampling, chunk, engine=engine)
    return grade_chunk(sampling, chunk, completions, rewarder=rewarder, tokenizer=tokenizer)


def generate_chunk(sampling: Sampling, chunk: int, *, engine: RolloutEngine) -> list[Completion]:
    problems = [problem for problem, _ in sampling.picks(chunk)]
    return engine.generate(
        [sampling.request(problem) for problem in problems],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.chunk_seed(chunk),
        weights_version=engine.weights_version,
    )


def grade_chunk(
    sampling: Sampling,
    chunk: int,
    completions: Sequence[Completion],
    *,
    rewarder: Rewarder,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Sample]:
    picks = sampling.picks(chunk)
    problems = [problem for problem, _ in picks]
    texts = [response_text(tokenizer, completion) for completion in completions]
    scores = rewarder.score(texts, problems)
    return [
        Sample(
            index=problem.index,
            sample=number,
            prompt=problem.prompt,
            response=text,
            extracted=extract_answer(text, sampling.answer_pattern),
            answer=problem.answer,
            status=score.status,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            has_thought="</think>" in text,
        )
        for (problem, number), completion, text, score in zip(
            picks, completions, texts, scores, strict=True
        )
    ]


def write_chunk(folder: Path, chunk: int, samples: Sequence[Sample]) -> None:
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    write_whole(chunk_file(folder, chunk), "".join(lines))


def read_samples(
    folder: Path, sampling: Sampling, kind: type[AnySample] = Sample
) -> Iterator[AnySample]:
    """All samples, in order, of chunks that are all there."""
    for chunk in range(sampling.num_chunks):
        with chunk_file(folder, chunk).open(encoding="utf-8") as lines:
            for line in lines:
                yield kind(**json.loads(line))


def share_chunks(
    chunks: Sequence[int],
    make: Callable[[int], None],
    *,
    label: str,
    num_chunks: int,
    engine: RolloutEngine,
    world: World,
) -> None:
    """Let each rank make its part of `chunks`; rank 0 tells how far it is. Collective.

    Args:
        make: generates, grades and writes a chunk.
        label: what the chunks are of.
        num_chunks: those that are there already included.
    """
    own = list(world.shard(chunks))
    for turn in range(-(-len(chunks) // world.size)):
        if turn < len(own):
            make(own[turn])
        elif engine.is_collective:  # its peers wait for it
            engine.generate([], temperature=1.0, seed=0, weights_version=0)
        if world.is_main:
            done = num_chunks - max(0, len(chunks) - (turn + 1) * world.size)
            print(f"{label}: {done} of {num_chunks} chunks", file=sys.stderr, flush=True)
