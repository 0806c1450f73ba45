"""The rehearsal: a real step at its limits, its peaks by phase, and nothing on disk."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefix_rft import cli
from prefix_rft.config import Config, save_config
from prefix_rft.data_types import MiniBatch, Problem, Segment, TrainRow
from prefix_rft.methods import METHODS
from prefix_rft.model import Policy, World
from prefix_rft.rollout.transformers_engine import TransformersEngine
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.phase_peaks import PhasePeaks
from prefix_rft.train.rehearsal import RehearsalError, rehearse
from prefix_rft.train.setup import Setup
from prefix_rft.train.worst_case import cut, filled, num_fed, step_tokens, worst_config
from tests.tiny import make_run

PROMPT, RESPONSE, BUDGET = 32, 16, 100  # two rows of 47 and one of 6
BEFORE = {"load", "start of the engine", "optimizer state", "load reference"}
CPU = torch.device("cpu")
MIB = 2**20


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def worst_run(folder: Path, **sections: dict) -> Config:
    """A tiny run whose step is 4 prompts x 4 rollouts in two updates, in several micro-batches."""
    return make_run(
        folder, **{"trainer": {"micro_batch_tokens": BUDGET, "num_steps": 4}} | sections
    )


def test_the_phases_are_those_of_a_step_and_everything_is_at_its_limit(tmp_path: Path) -> None:
    # Most random responses would end early: by the end of a sequence or by a frequent letter.
    config = worst_run(
        tmp_path,
        rollout={"stop": ("a",), "mask_truncated": True},
        loss={"kl": "k3", "kl_coef": 0.1},
    )
    before = files(tmp_path)
    done, is_main = rehearse(config)
    assert is_main and files(tmp_path) == before
    assert done.response_lengths == (RESPONSE, RESPONSE)
    assert done.num_responses == 16
    assert done.micro_batch_tokens == BUDGET
    with (
        World() as world,
        Setup(config, config.model.path, world) as setup,
        Interrupt(world) as interrupt,
    ):
        metrics, _ = setup.trainer().train_step(interrupt)
    real = {name[len("time/") : -len("_s")] for name in metrics if name.startswith("time/")}
    assert set(done.peaks) == (real - {"step"}) | BEFORE
    assert set(done.plan) == set(done.times) == set(done.peaks)
    assert 0 < done.start_bytes <= min(done.peaks.values())
    assert done.plan["update"] > done.plan["optimizer state"] > done.plan["load"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_rehearsed(tmp_path: Path, name: str) -> None:
    trainer = {"micro_batch_tokens": BUDGET, "prompts_per_step": 16, "prompts_per_update": 8}
    done, _ = rehearse(worst_run(tmp_path, method={"name": name}, trainer=trainer))
    assert done.micro_batch_tokens == BUDGET
    assert done.peaks["update"] > 0


def test_a_base_that_is_not_there_is_made_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32, "vocab_size": 300}
    config = worst_run(tmp_path, base=base)
    config = replace(config, model=replace(config.model, path=None))
    before = files(tmp_path)
    done, _ = rehearse(config)
    assert files(tmp_path) == before
    assert done.response_lengths == (RESPONSE, RESPONSE)


@pytest.mark.parametrize(
    ("owner", "name", "phase", "lower"),
    [
        (Policy, "loss", "update", "trainer.micro_batch_tokens"),
        (TransformersEngine, "_generate_batch", "generate", "rollout.max_batch_sequences"),
        (torch.optim.AdamW, "step", "optimizer state", "optimizer.name"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_phase_and_what_to_lower(
    tmp_path: Path, monkeypatch, owner: type, name: str, phase: str, lower: str, error: Exception
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    config = worst_run(tmp_path)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RehearsalError, match=f"out of memory in the phase '{phase}'.*{lower}"):
        rehearse(config)


def test_another_error_stays_what_it_is(tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("shapes differ")

    config = worst_run(tmp_path)
    monkeypatch.setattr(Policy, "loss", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        rehearse(config)


def test_peaks_are_of_their_phase() -> None:
    peaks = PhasePeaks(CPU)
    with peaks.phase("outer"):
        with peaks.phase("large"):
            held = torch.ones(256 * MIB, dtype=torch.uint8)
            del held
        with peaks.phase("small"):
            pass
    with peaks.phase("after"):
        pass
    assert list(peaks.peaks) == ["outer", "large", "small", "after"]
    assert peaks.peaks["outer"] >= peaks.peaks["large"] > peaks.peaks["small"] + 200 * MIB
    assert peaks.peaks["outer"] > peaks.peaks["after"] + 200 * MIB
    with pytest.raises(ValueError), peaks.phase("first"), peaks.phase("second"):
        raise ValueError
    assert peaks.failed == "second"


def row(num_prompt: int, num_prefix: int, num_own: int) -> TrainRow:
    own = tuple(range(num_own))
    return TrainRow(
        prompt_ids=tuple(range(num_prompt)),
        segments=(
            Segment(token_ids=tuple(range(num_prefix)), source="demonstration"),
            Segment(token_ids=own, source="policy", rollout_log_probs=tuple(map(float, own))),
        ),
        origin=Problem(index=0, prompt="", prompt_ids=(), answer=""),
    )


def test_a_row_is_cut_at_the_end_and_keeps_its_response() -> None:
    short = cut(row(10, 3, 5), 6)  # of 17
    assert num_fed(short) == 6
    assert short.prompt_ids == (0,)
    assert [segment.token_ids for segment in short.segments] == [(0, 1, 2), (0, 1, 2)]
    assert short.segments[1].rollout_log_probs == (0.0, 1.0, 2.0)
    longer = cut(row(10, 3, 5), 12)
    assert num_fed(longer) == 12 and longer.response_ids == row(10, 3, 5).response_ids


def test_micro_batches_are_filled_where_there_are_rows_for_it() -> None:
    def lengths(num_rows: int, budget: int, num_ranks: int) -> list[int]:
        rows = [row(10, 3, 5) for _ in range(num_rows)]
        made = filled(MiniBatch(rows=rows, normalizer=1.0), budget, num_ranks)
        return [num_fed(each) for each in made.rows]

    assert lengths(7, 40, 1) == [17, 17, 17, 17, 6, 6]
    assert lengths(7, 40, 2) == [17, 17, 17, 17, 6, 6]
    assert lengths(5, 40, 2) == [17] * 5  # not for both ranks
    assert lengths(5, 34, 1) == [17] * 5  # they fit
    assert lengths(5, 16, 1) == [17] * 5  # each goes alone


def test_a_step_is_shortened_to_what_reaches_its_peaks(tmp_path: Path) -> None:
    large = {"prompts_per_step": 512, "prompts_per_update": 64, "micro_batch_tokens": BUDGET}
    config = make_run(tmp_path, trainer=large, rollout={"max_batch_sequences": 40})
    short = worst_config(config, 1).trainer  # 40 sequences in groups of 4
    assert (short.prompts_per_step, short.prompts_per_update) == (10, 5)
    short = worst_config(config, 4).trainer
    assert (short.prompts_per_step, short.prompts_per_update) == (40, 20)
    # A row a prompt: two micro-batches of three rows in each of two updates, or a full engine.
    sft = replace(config, method=replace(config.method, name="sft"))
    short = worst_config(sft, 1).trainer
    assert (short.prompts_per_step, short.prompts_per_update) == (40, 20)
    assert step_tokens(sft) == 512 * (PROMPT + RESPONSE - 1) == step_tokens(config) // 4
    tiny = worst_config(make_run(tmp_path, rollout={"max_batch_sequences": 1024}), 1).trainer
    assert (tiny.prompts_per_step, tiny.prompts_per_update) == (4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--rehearse: expected a CONFIG"),
        (["gsm8k", "--num-processes", "2"], "start it with torchrun"),
        (["gsm8k", "--device-gib", "80"], "no --device-gib"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(options: list[str], message: str, capsys) -> None:
    assert cli.main(["doctor", *options, "--rehearse"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_rehearse_together(tmp_path: Path) -> None:
    config = worst_run(tmp_path)
    save_config(config, tmp_path / "config.toml")
    before = files(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "prefix_rft", "doctor", str(tmp_path / "config.toml"), "--rehearse"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.count("Rehearsal of tiny") == 1
    assert f"16 responses of {RESPONSE} tokens" in done.stdout
    assert files(tmp_path) == before
