"""Checkpoints: written under a temporary name and renamed, verified before they are loaded.

<run>/checkpoints/step-000050/
    state/          trained weights and optimizers, torch.distributed.checkpoint
    trainer.json    step, parameter shapes, data fingerprint, what the method remembers
    rng-<rank>.json     generator states of python, numpy and torch
    manifest.json   size and crc32 of every other file, written last

Our own files hold no code, but torch.distributed.checkpoint unpickles state/.metadata and the
options of the optimizers: load only checkpoints that you trust.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial as partial_call
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from prefix_rft.checks import UserError
from prefix_rft.model import World
from prefix_rft.train.generators import rng_states, set_rng_states

Optimizers = Mapping[str, torch.optim.Optimizer]  # by name

FORMAT = 5  # incremented when the layout changes
# 3 has its generators in a pickle, which is left alone; up to 4 the digest of the data is another.
_READABLE = (3, 4, FORMAT)
_OLD_DIGEST = 4
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # the rest is the base's
for _message in (".*torch.distributed is disabled.*", ".*the intent is to .* single process.*"):
    warnings.filterwarnings("ignore", message=_message)  # as intended; the writing thread warns too


class CheckpointError(UserError):
    """A checkpoint cannot be written or used; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """The progress of a run; schedules and the position in the data follow from the step."""

    step: int  # number of steps done
    data_fingerprint: str  # identifies the training problems
    method: dict[str, Any] = field(default_factory=dict)  # what the method remembers, as JSON


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps done at a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-[0-9]*"))


class CheckpointWriter:
    """Writes the checkpoints of a run; use as a context manager.

    In the background, a copy in host memory is written while training continues. A checkpoint gets
    its name once it is complete.

    Args:
        keep: number of newest checkpoints to keep.
        in_background: `save` returns as soon as the copy is made.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, in_background: bool, world: World | None = None
    ) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.in_background = in_background
        self.world = World() if world is None else world
        self._group = None  # not training's own group, which is in use meanwhile
        if in_background and self.world.mesh is not None:
            self._group = dist.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._pending: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        """Wait for the pending write; its error is only raised if no other is on its way."""
        if kind is None:
            self.finish()
        self._executor.shutdown()

    def save(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        state: TrainerState,
        *,
        reference: nn.Module | None = None,
    ) -> None:
        """Write the checkpoint of `state.step`, then delete all but the newest. Collective.

        Args:
            reference: the model of a reference that follows the policy.
        Raises:
            CheckpointError: this or the previous checkpoint could not be written; earlier ones are
                untouched.
        """
        self.finish()
        target = checkpoint_dir(self.run_dir, state.step)
        partial = target.with_name(f".partial-{target.name}")
        description = {"format": FORMAT, "shapes": _shapes(model), "state": asdict(state)}
        description["has_reference"] = reference is not None
        self.world.broadcast(lambda: self._guard(target, lambda: _start(partial, description)))
        saved = _states(model, optimizers, reference)

        def write_states() -> None:
            (partial / _rng_file(self.world.rank)).write_text(json.dumps(rng_states()))

        self._guard(target, write_states)
        options = {"checkpoint_id": partial / "state", "no_dist": self.world.mesh is None}
        write = partial_call(dcp.save, saved, **options)
        if self.in_background:
            write = dcp.async_save(saved, process_group=self._group, **options).result

        def complete() -> None:
            write()
            if self.world.is_main:
                _publish(partial, target)
                for old in list_checkpoints(self.run_dir)[: -self.keep]:
                    shutil.rmtree(old)

        if self.in_background:
            self._pending = self._executor.submit(self._guard, target, complete)
        else:
            self._guard(target, complete)
            self.world.all_gather_object(None)  # no rank continues before it is complete

    def check(self) -> None:
        """Raise the CheckpointError of a background write that has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def finish(self) -> None:
        """Wait until the last checkpoint is complete. Collective.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        errors = self.world.all_gather_object(None if pending is None else _error_of(pending))
        for error in errors:
            if error is not None:
                raise error

    def _guard(self, target: Path, action: Callable[[], None]) -> None:
        """Run `action`; if it fails, remove the incomplete checkpoint."""
        try:
            action()
        except (OSError, CheckpointException) as error:
            shutil.rmtree(target.with_name(f".partial-{target.name}"), ignore_errors=True)
            kept = list_checkpoints(self.run_dir)
            raise CheckpointError(
                f"checkpoint of step {checkpoint_step(target)} could not be written to "
                f"{target.parent}: {_root_cause(error)}; the last good one is "
                f"{kept[-1] if kept else 'none'}"
            ) from error


def _error_of(pending: Future) -> CheckpointError | None:
    error = pending.exception()
    if error is None or isinstance(error, CheckpointError):
        return error
    raise error


def _start(partial: Path, description: dict) -> None:
    """Create the folder of a checkpoint with only its description in it."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "trainer.json").write_text(json.dumps(description))


def _publish(partial: Path, target: Path) -> None:
    """Add the manifest to a complete checkpoint and rename it into place."""
    manifest = {
        str(file.relative_to(partial)): [file.stat().st_size, _crc32(file)]
        for file in sorted(partial.rglob("*"))
        if file.is_file()
    }
    (partial / "manifest.json").write_text(json.dumps(manifest))
    for file in partial.rglob("*"):
        _fsync(file)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _fsync(target.parent)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: Optimizers,
    *,
    data_fingerprint: str,
    old_fingerprint: Callable[[], str] | None = None,
    reference: nn.Module | None = None,
    world: World | None = None,
) -> TrainerState:
    """Restore the models, `optimizers` and the random generators in place. Collective.

    The checkpoint may have been written by any number of ranks. A rank without generator states in
    it keeps its own.

    Args:
        data_fingerprint: of the training problems.
        old_fingerprint: gives the one that checkpoints up to format 4 have.
    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another model or other data, or has
            no `reference`.
    """
    world = World() if world is None else world
    description = world.broadcast(lambda: _verify(path))
    _require_same_model(path, description["shapes"], model)
    state = TrainerState(**description["state"])
    if description["format"] <= _OLD_DIGEST and old_fingerprint is not None:
        data_fingerprint = old_fingerprint()
    if state.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"checkpoint {path}: expected the training problems it was written with "
            f"(fingerprint {state.data_fingerprint}), got others ({data_fingerprint})"
        )
    if reference is not None and not description.get("has_reference"):
        raise CheckpointError(
            f"checkpoint {path}: expected the weights of the reference, for "
            "reference.update_every, got none: its steps were done without"
        )
    loaded = _states(model, optimizers, reference)
    dcp.load(loaded, checkpoint_id=path / "state", no_dist=world.mesh is None)
    set_model_state_dict(model, loaded["model"], options=_TRAINED)
    if reference is not None:
        set_model_state_dict(reference, loaded["reference"], options=_TRAINED)
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(model, optimizer, loaded["optimizers"][name], options=_TRAINED)
    generators = path / _rng_file(world.rank)
    if generators.exists():
        set_rng_states(json.loads(generators.read_text()))
    return state


def _states(
    model: nn.Module, optimizers: Optimizers, reference: nn.Module | None
) -> dict[str, Any]:
    states = (
        {}
        if reference is None
        else {"reference": get_model_state_dict(reference, options=_TRAINED)}
    )
    return states | {
        "model": get_model_state_dict(model, options=_TRAINED),
        "optimizers": {
            name: _optimizer_state(model, optimizer) for name, optimizer in optimizers.items()
        },
    }


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer; one that has not taken a step yet is left as if it had not."""
    is_fresh = not optimizer.state
    state = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
    if is_fresh:  # torch has made its state by a step without gradients
        for each in optimizer.state.values():
            each["step"].zero_()
    return state


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Restore only the trained weights of `model`, in place.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another model.
    """
    _require_same_model(path, _verify(path)["shapes"], model)
    state = {"model": get_model_state_dict(model, options=_TRAINED)}
    dcp.load(state, checkpoint_id=path / "state", no_dist=True)
    set_model_state_dict(model, state["model"], options=_TRAINED)


def _verify(path: Path) -> dict:
    """The description of a checkpoint, once all of its files match the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, (size, crc) in manifest.items():
            file = path / name
            if file.stat().st_size != size or _crc32(file) != crc:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} has changed")
        description = json.loads((path / "trainer.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged or no checkpoint: {error}") from error
    if description.get("format") not in _READABLE:
        raise CheckpointError(
            f"checkpoint {path}: expected format {FORMAT}, got {description.get('format')}"
        )
    return description


def _require_same_model(path: Path, shapes: dict[str, list[int]], model: nn.Module) -> None:
    ours = _shapes(model)
    different = sorted(
        name for name in shapes.keys() | ours.keys() if shapes.get(name) != ours.get(name)
    )
    if different:
        name = different[0]
        raise CheckpointError(
            f"checkpoint {path} belongs to another model: {len(different)} parameters differ, the "
            f"first is {name}: expected {ours.get(name)}, got {shapes.get(name)}"
        )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.json"


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0]
