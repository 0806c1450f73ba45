"""Checkpoints: written beside their place and renamed into it, checked before they are believed.

<run>/checkpoints/step-000050/
    state/          model and optimizer, torch.distributed.checkpoint
    trainer.json    step, parameter shapes, data fingerprint
    rng.pt          generator states of python, numpy and torch
    manifest.json   size and crc32 of every other file, written last
"""

import json
import os
import random
import shutil
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from prefix_rft.config import UserError

FORMAT = 1  # raised when the layout changes


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands; the schedules and the position in the data follow from the step."""

    step: int  # steps done
    data_fingerprint: str  # of the training problems


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """Steps done at a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-[0-9]*"))


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step`, then delete all but the newest `keep`.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
    """
    target = checkpoint_dir(run_dir, state.step)
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        _dcp(dcp.save, {"model": model_state, "optimizer": optimizer_state}, partial / "state")
        torch.save(_rng_states(), partial / "rng.pt")
        description = {"format": FORMAT, "shapes": _shapes(model), "state": asdict(state)}
        (partial / "trainer.json").write_text(json.dumps(description))
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
    except (OSError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(run_dir)
        raise CheckpointError(
            f"checkpoint of step {state.step} could not be written to {target.parent}: "
            f"{_root_cause(error)}; the last good one is {kept[-1] if kept else 'none'}"
        ) from error
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, data_fingerprint: str
) -> TrainerState:
    """Restore `model`, `optimizer` and the random generators in place.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model or of other data.
    """
    description = _verify(path)
    _require_same_model(path, description["shapes"], model)
    state = TrainerState(**description["state"])
    if state.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"checkpoint {path}: expected the training problems it was made with "
            f"(fingerprint {state.data_fingerprint}), got others ({data_fingerprint})"
        )
    model_state, optimizer_state = get_state_dict(model, optimizer)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    _dcp(dcp.load, loaded, path / "state")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    _set_rng_states(torch.load(path / "rng.pt", weights_only=False))
    return state


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Restore only the weights of `model`, in place.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    _require_same_model(path, _verify(path)["shapes"], model)
    state = {"model": model.state_dict()}
    _dcp(dcp.load, state, path / "state")
    model.load_state_dict(state["model"])


def _verify(path: Path) -> dict:
    """The description of a checkpoint whose every file is as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, (size, crc) in manifest.items():
            file = path / name
            if file.stat().st_size != size or _crc32(file) != crc:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not as written")
        description = json.loads((path / "trainer.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged or foreign: {error}") from error
    if description.get("format") != FORMAT:
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
            f"checkpoint {path} is of another model: {len(different)} parameters differ, first "
            f"{name}: expected {ours.get(name)}, got {shapes.get(name)}"
        )


def _dcp(operation, state: dict, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        warnings.filterwarnings("ignore", message=".*assuming the intent is to .* single process.*")
        operation(state, checkpoint_id=folder, no_dist=True)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def _rng_states() -> dict:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_rng_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


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
