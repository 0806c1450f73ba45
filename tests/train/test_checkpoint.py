"""Checkpoints: exact, atomic, checked, and kept when the disk is full."""

import copy
import json
import pickle
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from prefix_rft.train.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    list_checkpoints,
    load_model_weights,
)
from prefix_rft.train.generators import rng_states, set_rng_states
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.trainer import old_fingerprint
from tests.tiny import make_model, make_trainer

CONFIG = {
    "rollout": {"group_size": 4, "max_response_length": 16},
    "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 1},
    "trainer": {"num_steps": 4, "prompts_per_step": 3, "prompts_per_update": 3},
}


def run(trainer, num_steps: int) -> list[dict]:
    """The metrics of the next steps, without wall times."""
    records = [trainer.train_step(Interrupt())[0] for _ in range(num_steps)]
    timed = ("time/", "throughput/")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records]


def save(trainer, run_dir: Path, *, in_background: bool = False) -> None:
    with CheckpointWriter(run_dir, keep=2, in_background=in_background) as checkpoints:
        trainer.save(checkpoints)


def is_equal(model, other) -> bool:
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with one checkpoint, at step 2."""
    trainer = make_trainer(CONFIG)
    run(trainer, 2)
    save(trainer, tmp_path)
    return tmp_path


def test_resume_continues_bit_for_bit(saved: Path) -> None:
    whole = make_trainer(CONFIG)
    records = run(whole, 4)
    resumed = make_trainer(CONFIG)
    run(resumed, 1)  # nothing it did before may have an effect
    resumed.restore(list_checkpoints(saved)[-1])
    assert resumed.step_index == 2
    assert run(resumed, 2) == records[2:]
    assert is_equal(resumed.policy.model, whole.policy.model)
    ours, theirs = (t.optimizers["policy"].state_dict()["state"] for t in (resumed, whole))
    for index in theirs:
        assert all(torch.equal(ours[index][name], theirs[index][name]) for name in theirs[index])


def test_generators_are_restored(saved: Path) -> None:
    def drawn() -> list[float]:
        # An odd number of Gaussians: the generators keep the other half of a pair.
        return [
            *torch.rand(3).tolist(),
            *torch.randn(3).tolist(),
            *np.random.normal(size=3).tolist(),
            *[random.gauss(0, 1) for _ in range(3)],
        ]

    trainer = make_trainer(CONFIG)
    trainer.restore(list_checkpoints(saved)[-1])
    drawn()
    save(trainer, saved)
    first = drawn()
    assert first != drawn()
    trainer.restore(list_checkpoints(saved)[-1])
    assert drawn() == first


class Code:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_what_a_checkpoint_pickled_is_not_read(saved: Path, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(saved)[-1]
    assert [path.name for path in checkpoint.glob("rng-*")] == ["rng-0.json"]
    trainer = make_trainer(CONFIG)
    write_old_description(checkpoint, 3, old_fingerprint(trainer.problems))
    (checkpoint / "rng-0.json").unlink()
    (checkpoint / "rng-0.pickle").write_bytes(pickle.dumps(Code(tmp_path / "was_run")))
    trainer.restore(checkpoint)
    assert trainer.step_index == 2 and not (tmp_path / "was_run").exists()


def write_old_description(checkpoint: Path, number: int, data_fingerprint: str) -> None:
    """Make it one of format `number`; its files are not verified."""
    description = json.loads((checkpoint / "trainer.json").read_text())
    description |= {"format": number}
    description["state"]["data_fingerprint"] = data_fingerprint
    (checkpoint / "trainer.json").write_text(json.dumps(description))
    (checkpoint / "manifest.json").write_text("{}")


def test_an_older_checkpoint_has_another_digest_of_the_same_problems(saved: Path) -> None:
    checkpoint = list_checkpoints(saved)[-1]
    trainer = make_trainer(CONFIG)
    write_old_description(checkpoint, 4, old_fingerprint(trainer.problems[::-1]))
    with pytest.raises(CheckpointError, match="expected the training problems it was written with"):
        trainer.restore(checkpoint)
    write_old_description(checkpoint, 4, old_fingerprint(trainer.problems))
    trainer.restore(checkpoint)
    assert trainer.step_index == 2


def test_a_machine_with_fewer_devices_takes_up_the_generators(monkeypatch) -> None:
    generators = [torch.Generator() for _ in range(2)]  # stand for those of two devices
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    random = torch.cuda.random
    monkeypatch.setattr(random, "_lazy_init", lambda: None)
    monkeypatch.setattr(random, "_lazy_call", lambda function, **_: function())
    monkeypatch.setattr(random, "current_device", lambda: 0)
    monkeypatch.setattr(random, "device_count", lambda: len(generators))
    states = rng_states()
    first = torch.rand(3, generator=generators[0])
    del generators[1]
    set_rng_states(states)
    assert torch.equal(torch.rand(3, generator=generators[0]), first)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    trainer = make_trainer(CONFIG)
    for _ in range(4):
        run(trainer, 1)
        save(trainer, tmp_path)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000003", "step-000004"]


def test_saving_the_same_step_again_is_safe(saved: Path) -> None:
    trainer = make_trainer(CONFIG)
    trainer.restore(list_checkpoints(saved)[-1])
    save(trainer, saved)
    trainer.restore(list_checkpoints(saved)[-1])


def test_weights_alone_can_be_loaded(saved: Path) -> None:
    trainer = make_trainer(CONFIG)
    run(trainer, 2)
    model = make_model(len(trainer.tokenizer), seed=1)
    load_model_weights(list_checkpoints(saved)[-1], model)
    assert is_equal(model, trainer.policy.model)


def damage(checkpoint: Path, how: str) -> None:
    data = next((checkpoint / "state").glob("*.distcp"))
    if how == "a byte differs":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "cut off":
        data.write_bytes(data.read_bytes()[:-10])
    elif how == "file missing":
        data.unlink()
    elif how == "no manifest":
        (checkpoint / "manifest.json").unlink()
    elif how == "not json":
        (checkpoint / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "how", ["a byte differs", "cut off", "file missing", "no manifest", "not json"]
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(saved: Path, how: str) -> None:
    checkpoint = list_checkpoints(saved)[-1]
    damage(checkpoint, how)
    trainer = make_trainer(CONFIG)
    before = copy.deepcopy(trainer.policy.model)
    with pytest.raises(CheckpointError, match="step-000002 is damaged"):
        trainer.restore(checkpoint)
    assert is_equal(trainer.policy.model, before)


def test_a_checkpoint_of_another_format_is_refused(saved: Path) -> None:
    checkpoint = list_checkpoints(saved)[-1]
    description = json.loads((checkpoint / "trainer.json").read_text())
    (checkpoint / "trainer.json").write_text(json.dumps(description | {"format": 99}))
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected format 5, got 99"):
        make_trainer(CONFIG).restore(checkpoint)


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    model = make_model(60)
    with pytest.raises(CheckpointError, match="belongs to another model: .* parameters differ"):
        load_model_weights(list_checkpoints(saved)[-1], model)


def test_a_checkpoint_of_other_data_is_refused(saved: Path) -> None:
    trainer = make_trainer(CONFIG, num_problems=5)
    with pytest.raises(CheckpointError, match="the training problems it was written with"):
        trainer.restore(list_checkpoints(saved)[-1])


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_leaves_the_last_good_checkpoint(saved: Path, in_background: bool) -> None:
    trainer = make_trainer(CONFIG)
    trainer.restore(list_checkpoints(saved)[-1])
    run(trainer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # writes fail past 4 KiB
    try:
        with pytest.raises(CheckpointError, match="step 3 could not be written.*step-000002"):
            save(trainer, saved, in_background=in_background)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["step-000002"]
    make_trainer(CONFIG).restore(list_checkpoints(saved)[-1])
    save(trainer, saved)  # with room again, the run continues
    assert list_checkpoints(saved)[-1].name == "step-000003"


def test_in_the_background_the_weights_of_the_step_are_written(tmp_path: Path) -> None:
    trainer = make_trainer(CONFIG)
    run(trainer, 1)
    then = copy.deepcopy(trainer.policy.model)
    with CheckpointWriter(tmp_path, keep=2, in_background=True) as checkpoints:
        trainer.save(checkpoints)
        run(trainer, 1)  # while it is written
        checkpoints.finish()
        [checkpoint] = list_checkpoints(tmp_path)
        checkpoints.check()
    model = make_model(len(trainer.tokenizer), seed=1)
    load_model_weights(checkpoint, model)
    assert is_equal(model, then) and not is_equal(model, trainer.policy.model)
