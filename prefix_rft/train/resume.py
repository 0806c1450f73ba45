"""What has been done in a run folder, and whether the run goes on from it."""

import json
import os
from pathlib import Path

from prefix_rft.checks import ConfigError
from prefix_rft.config import (
    CONFIG_FILE,
    SUMMARY_FILE,
    Config,
    by_key,
    is_run_folder,
    load_config,
)
from prefix_rft.methods import find_method
from prefix_rft.model import World
from prefix_rft.train.checkpoint import checkpoint_dir, checkpoint_step, list_checkpoints

# With another of these, steps are no continuation of those done.
_FIXED = ("method.name", "seed")
# Results of the base that were measured with others of these are measured again.
_MEASURED_WITH = (
    *("base.", "data.", "eval.", "model.", "reward.", "testbed.", "tiers.", "seed"),
    *("rollout.max_response_length", "rollout.stop"),
)


def open_run(config: Config, resume: bool) -> tuple[dict, list[Path]]:
    """The summary so far and the checkpoints to continue from.

    Raises:
        ConfigError: the steps done are not the beginning of this run.
    """
    if not resume:
        return {}, []
    summary, checkpoints = _read_summary(config.run_dir), list_checkpoints(config.run_dir)
    changes = changes_of(config)
    for key in _FIXED if checkpoints else ():
        if key in changes:
            before, now = changes[key]
            raise ConfigError(
                f"{key}: expected {before!r}, with which the steps in {config.run_dir} were done, "
                f"got {now!r}"
            )
    if not steps_follow_from_data(config) and is_finished(config, summary, checkpoints):
        return summary, checkpoints
    if any(key.startswith(_MEASURED_WITH) for key in changes):
        summary = {}
    return summary, checkpoints


def changes_of(config: Config) -> dict[str, tuple]:
    """(before, now) of each key in which `config` differs from the one in its run folder."""
    if not is_run_folder(config.run_dir):
        return {}
    before = by_key(load_config(config.run_dir / CONFIG_FILE))
    return {
        key: (before.get(key), now)
        for key, now in by_key(config).items()
        if key not in ("name", "output_dir") and before.get(key) != now
    }


def steps_follow_from_data(config: Config) -> bool:
    method = find_method(config.method.name)
    return method.num_steps(config.section(method), 1, 1) is not None


def is_finished(config: Config, summary: dict, checkpoints: list[Path]) -> bool:
    """Whether the run has its last checkpoint, its results and its model.

    Raises:
        ConfigError: it has done more steps than it is to do.
    """
    run_dir, num_steps = config.run_dir, config.trainer.num_steps
    if checkpoints and checkpoint_step(checkpoints[-1]) > num_steps:
        done = checkpoint_step(checkpoints[-1])
        raise ConfigError(
            f"trainer.num_steps: expected at least the {done} steps done in {run_dir}, "
            f"got {num_steps}"
        )
    is_written = summary.get("model_step") == num_steps
    return is_written and checkpoint_dir(run_dir, num_steps) in checkpoints


def _read_summary(run_dir: Path) -> dict:
    path = run_dir / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def write_summary(run_dir: Path, summary: dict, world: World) -> None:
    if not world.is_main:
        return
    partial = run_dir / f".partial-{SUMMARY_FILE}"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, run_dir / SUMMARY_FILE)
