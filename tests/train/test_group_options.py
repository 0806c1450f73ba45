"""What can be asked of a group, from the command line to the metrics of a run."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from prefix_rft import cli
from prefix_rft.config import Config, load_config, save_config
from prefix_rft.metrics.logger import read_records
from tests.model.test_distributed import output_of, torchrun
from tests.tiny import make_run

STEPS = {"num_steps": 2, "checkpoint_every": 0}
FUNCTIONS = {"math": 1.0, "tests.tiny:even_length": 0.5}


def train_records(config: Config, folder: Path, options: str = "", *, ranks: int = 1) -> list[dict]:
    save_config(config, folder / "run.toml")
    arguments = ["train", str(folder / "run.toml"), *options.split()]
    if ranks == 1:
        assert cli.main(arguments) == 0
    else:
        output_of(torchrun("-m", "prefix_rft", *arguments, ranks=ranks))
    records = read_records(config.run_dir / "metrics.jsonl")
    return [record for record in records if record["kind"] == "train"]


def has_learnt(config: Config) -> bool:
    base, trained = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (config.model.path, config.run_dir / "model")
    )
    return any((base[name] != trained[name]).any() for name in base)


def test_several_rewards_and_a_penalty(tmp_path: Path) -> None:
    config = make_run(tmp_path, trainer=STEPS, reward={"function": None})
    options = "--reward.overlong-tokens 8 --reward.overlong-penalty 0.5 --reward.functions"
    pairs = " ".join(f"{path} {weight}" for path, weight in FUNCTIONS.items())
    records = train_records(config, tmp_path, f"{options} {pairs}")
    assert load_config(config.run_dir / "config.toml").reward.functions == FUNCTIONS
    for record in records:
        assert 0 < record["reward/overlong_penalty_mean"] <= 0.5
        expected = record["reward/math_mean"] + 0.5 * record["reward/even_length_mean"]
        expected -= record["reward/overlong_penalty_mean"]
        assert record["reward/mean"] == pytest.approx(expected)
        assert record["grader/no_answer_sum"] > 0  # the grader's status, not the sum's
    assert has_learnt(config)


def test_scaled_advantages_of_rollouts_that_ended(tmp_path: Path) -> None:
    options = "--rollout.mask-truncated --method.advantage-scale batch_std"
    config = make_run(tmp_path, trainer=STEPS)
    for record in train_records(config, tmp_path, options):
        assert 0 < record["rollout/truncated_frac"] <= record["rollout/left_out_frac"] < 1
    assert has_learnt(config)


def test_groups_that_are_resampled(tmp_path: Path) -> None:
    options = {"rollout": {"group_size": 2}, "trainer": STEPS, "method": {"name": "rft"}}
    config = make_run(tmp_path, **options)
    records = train_records(config, tmp_path, "--rollout.resample-groups 2")
    assert sum(record["rollout/replaced_groups_sum"] for record in records) > 0
    for record in records:
        assert record["rollout/resampled_groups_sum"] >= record["rollout/replaced_groups_sum"]
        num_groups = 4 + record["rollout/resampled_groups_sum"]
        graded = sum(record[f"grader/{status}_sum"] for status in ("correct", "wrong"))
        assert graded == 2 * num_groups


@pytest.mark.slow
def test_groups_that_are_resampled_on_two_ranks(tmp_path: Path) -> None:
    options = {"rollout": {"group_size": 2}, "trainer": STEPS, "method": {"name": "rft"}}
    config = make_run(tmp_path, **options)
    records = train_records(config, tmp_path, "--rollout.resample-groups 2", ranks=2)
    assert [record["step"] for record in records] == [0, 1]
    assert sum(record["rollout/replaced_groups_sum"] for record in records) > 0
    assert has_learnt(config)
