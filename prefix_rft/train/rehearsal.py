"""`prefix-rft doctor CONFIG --rehearse`: one worst-case step on the device of the run, with made-up
data, and the peaks of its phases beside those of the plan. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from prefix_rft.checks import UserError
from prefix_rft.config import Config, make_method, model_at, require_packages
from prefix_rft.data import untrained_base
from prefix_rft.data_types import Group, MiniBatch, TrainBatch
from prefix_rft.doctor import Place, device_bytes, memory_terms, peak_bytes, shapes_of
from prefix_rft.metrics import StepMetrics
from prefix_rft.model import (
    World,
    check_micro_batches,
    end_of_response_id,
    load_policy,
    load_tokenizer,
    resolve_device,
    vocabulary_size,
)
from prefix_rft.rollout import make_engine
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.phase_peaks import PhasePeaks
from prefix_rft.train.reference import check_reference, load_reference
from prefix_rft.train.setup import check_length, for_method
from prefix_rft.train.trainer import Trainer
from prefix_rft.train.worst_case import (
    EveryOtherRight,
    filled,
    made_up_problems,
    step_tokens,
    worst_config,
)

_MORE_ROOM = "more processes, sharding.cpu_offload or model.lora_rank"
_LESS = {
    "load": f"a smaller model; or {_MORE_ROOM}",
    "load reference": f"reference.model to a smaller one; or {_MORE_ROOM}",
    "optimizer state": f'optimizer.name to "adamw_8bit"; or {_MORE_ROOM}',
    "push": "vllm.weight_bucket_mib, vllm.gpu_memory_utilization or vllm.kv_cache_mib",
}
_LESS_ROLLOUT = {
    "transformers": "rollout.max_batch_sequences or rollout.max_response_length",
    "vllm": "vllm.gpu_memory_utilization or vllm.kv_cache_mib",
    "vllm_server": "rollout.max_batch_sequences",
}
_LESS_UPDATE = (
    "trainer.micro_batch_tokens (at least one row, so rollout.max_response_length too), or set "
    "model.gradient_checkpointing"
)
_ROLLOUT_PHASES = ("start of the engine", "push", "generate", "reward", "wait")


class RehearsalError(UserError):
    """The run would run out of memory."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came of it; peaks are of the rank that needed the most."""

    device: torch.device
    start_bytes: int  # in use before the model was loaded
    peaks: Mapping[str, int]  # phase -> bytes, what was there before included
    times: Mapping[str, float]  # phase -> seconds
    plan: Mapping[str, int]  # phase -> bytes
    num_responses: int
    response_lengths: tuple[int, int]  # the shortest and the longest, in tokens
    micro_batch_tokens: int  # of the largest


def print_rehearsal(config: Config) -> None:
    """Rehearse `config` and, on rank 0, print the peaks.

    Raises:
        RehearsalError: there is not enough memory; it names the phase, and what to lower.
        ConfigError: `config` cannot be run.
    """
    done, is_main = rehearse(config)
    if not is_main:
        return
    on_cuda = done.device.type == "cuda"
    what = "memory that torch allocated" if on_cuda else "resident memory of the process"
    table = Table(title=f"Rehearsal of {config.name}: peaks of {what}", title_justify="left")
    for column in ("phase", "peak", "of it the run's", "plan", "seconds"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, peak in done.peaks.items():
        own = max(0, peak - done.start_bytes)
        sizes = (f"{size / 2**20:,.1f} MiB" for size in (peak, own, done.plan[phase]))
        table.add_row(phase, *sizes, f"{done.times[phase]:.1f}")
    console = Console(highlight=False)
    console.print(table)
    shortest, longest = done.response_lengths
    lengths = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    console.print(
        f"{done.num_responses} responses of {lengths} tokens behind prompts of "
        f"{config.data.max_prompt_tokens}; micro-batches of up to {done.micro_batch_tokens} "
        f"tokens; {done.start_bytes / 2**20:,.1f} MiB were in use before the model was loaded."
    )


def rehearse(config: Config) -> tuple[Rehearsal, bool]:
    """Take one step of the largest sizes that `config` allows, and whether this is rank 0.

    Under torchrun on all ranks. The weights are those of the run, but for a base that is made by
    [base]: random ones of its shape. The folder of the run is not touched.

    Raises: see `print_rehearsal`.
    """
    require_packages(config)
    device = resolve_device(config.model)
    with World(config.sharding, device) as world, ExitStack() as stack:
        peaks = PhasePeaks(device)
        with peaks.phase("start"):
            pass
        start = peaks.peaks.pop("start")
        if config.model.path is None:
            folder = stack.enter_context(TemporaryDirectory())
            path = untrained_base(config.base, Path(folder))
        else:
            path = model_at(config.model.path)
        with _named(peaks, config):
            seen = _step(worst_config(config, world.size), config, path, peaks, world)
        gathered = world.all_gather_object((peaks.peaks, start, seen))
        totals = peaks.result()
        lengths = [length for _, _, other in gathered for length in other.response_lengths]
        done = Rehearsal(
            device=device,
            start_bytes=min(other for _, other, _ in gathered),
            peaks={name: max(each[name] for each, _, _ in gathered) for name in peaks.peaks},
            times={name: totals[f"time/{name}_s"] for name in peaks.peaks},
            plan=_plan(config, device, world.size, peaks.peaks),
            num_responses=len(seen.response_lengths),
            response_lengths=(min(lengths, default=0), max(lengths, default=0)),
            micro_batch_tokens=max(max(other.micro_batches) for _, _, other in gathered),
        )
        return done, world.is_main


@dataclass(kw_only=True)
class _Seen:
    """Sizes that the step came to."""

    response_lengths: list[int]  # of all ranks' rollouts
    micro_batches: list[int]  # tokens of each


def _step(
    config: Config, whole: Config, path: Path | str, peaks: PhasePeaks, world: World
) -> _Seen:
    """
    Args:
        config: that of the shortened step.
        whole: that of the run.
    """
    check_length(config, path)
    tokenizer = load_tokenizer(path, config.model.chat_template)
    vocab_size = vocabulary_size(tokenizer)
    method = make_method(config, eos_token_id=end_of_response_id(tokenizer))
    if method.uses_reference:
        check_reference(config, tokenizer)
    with peaks.phase("load"):
        policy = load_policy(config, path, vocab_size=vocab_size, world=world)
    with peaks.phase("start of the engine"):
        engine = make_engine(config, policy, tokenizer)
    engine.ignore_ends()
    check_micro_batches(policy.model, config.trainer.micro_batch_tokens)
    reference = None
    if method.uses_reference:
        with peaks.phase("load reference"):
            reference = load_reference(config, path, policy, vocab_size=vocab_size, world=world)
    config, problems = for_method(config, made_up_problems(config, vocab_size))
    trainer = Trainer(
        config,
        policy=policy,
        tokenizer=tokenizer,
        engine=engine,
        rewarder=EveryOtherRight(),
        problems=problems,
        reference=reference,
        world=world,
    )
    with peaks.phase("optimizer state"):
        _make_state(trainer)
    seen = _fill(trainer, whole)
    with Interrupt(world) as interrupt:
        trainer.advance(peaks, interrupt)
    engine.close()
    return seen


def _make_state(trainer: Trainer) -> None:
    """What every optimizer keeps from its first step on, by a step of no gradient."""
    trained = [each for each in trainer.policy.parameters() if each.requires_grad]
    for optimizer in trainer.optimizers.values():
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _fill(trainer: Trainer, whole: Config) -> _Seen:
    """Let the step of `trainer` have full micro-batches, and hold what a whole one holds.

    All rows of a step are in tensors at once; for those that it is short of, memory of their size
    is held.
    """
    seen = _Seen(response_lengths=[], micro_batches=[0])
    held: list[torch.Tensor] = []
    mini_batches, pack, micro_batches = (
        trainer.method.mini_batches,
        trainer.pack,
        trainer.micro_batches,
    )

    def full_mini_batches(groups: list[Group], step: int) -> list[MiniBatch]:
        seen.response_lengths += [len(r.response_ids) for g in groups for r in g.rollouts]
        budget = trainer.config.trainer.micro_batch_tokens
        return [filled(each, budget, trainer.world.size) for each in mini_batches(groups, step)]

    def pack_with_the_rest(mini_batch: MiniBatch, metrics: StepMetrics) -> TrainBatch | None:
        batch = pack(mini_batch, metrics)
        if batch is not None:
            missing = step_tokens(whole) // trainer.updates_per_step - len(batch.input_ids)
            size = max(0, missing) * _token_bytes(batch)
            held.append(torch.ones(size, dtype=torch.uint8, device=trainer.policy.device))
        return batch

    def noted_micro_batches(lengths: list[int]) -> list[list[int]]:
        plan = micro_batches(lengths)
        seen.micro_batches += [sum(lengths[row] for row in rows) for rows in plan]
        return plan

    trainer.method.mini_batches = full_mini_batches
    trainer.pack = pack_with_the_rest
    trainer.micro_batches = noted_micro_batches
    return seen


def _token_bytes(batch: TrainBatch) -> int:
    """Bytes of a token in the tensors of a batch."""
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    num_tokens = len(batch.input_ids)
    return sum(
        tensor.itemsize
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and len(tensor) == num_tokens
    )


@contextmanager
def _named(peaks: PhasePeaks, config: Config) -> Iterator[None]:
    """An out-of-memory becomes one line that names the phase and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch's allocator on a CPU raises a bare RuntimeError.
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        phase = peaks.failed or "load"
        default = _LESS_ROLLOUT[config.rollout.engine] if phase in _ROLLOUT_PHASES else _LESS_UPDATE
        size = device_bytes(peaks.device) / 2**30
        raise RehearsalError(
            f"out of memory in the phase {phase!r} ({peaks.peaks.get(phase, 0) / 2**30:.2f} GiB in "
            f"use at its peak, {peaks.device} has {size:.2f} GiB): lower "
            f"{_LESS.get(phase, default)}"
        ) from error


def _plan(
    config: Config, device: torch.device, num_processes: int, phases: Mapping[str, int]
) -> dict[str, int]:
    """What the memory plan has for each phase."""
    size = device_bytes(device) // (num_processes if device.type == "cpu" else 1)
    place = Place(device=device, device_bytes=size, num_processes=num_processes)
    terms = memory_terms(config, shapes_of(config, place), place)
    always = [term for term in terms if term.phase == "always"]
    loaded = sum(term.num_bytes for term in always if not term.name.startswith("optimizer"))
    reference = sum(term.num_bytes for term in always if term.name.endswith("reference"))
    state = sum(term.num_bytes for term in always)
    gradients = sum(term.num_bytes for term in terms if term.name == "gradients")
    plan = dict.fromkeys(phases, peak_bytes(terms, "update"))
    plan |= {phase: peak_bytes(terms, "rollout") for phase in _ROLLOUT_PHASES if phase in phases}
    return plan | {
        name: value
        for name, value in {
            "load": loaded - reference,
            "load reference": loaded,
            "optimizer state": state + gradients,
        }.items()
        if name in phases
    }
