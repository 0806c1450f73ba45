import json
import math
import sys
import types
from pathlib import Path

import pytest

from prefix_rft.checks import UserError
from prefix_rft.config.sections import LogConfig
from prefix_rft.metrics.logger import MetricsLogger, read_records
from prefix_rft.metrics.progress import format_rate, format_seconds

QUIET = LogConfig(tensorboard=False, progress="plain")


def logger(run_dir: Path, config: LogConfig = QUIET, *, start_step: int = 0) -> MetricsLogger:
    return MetricsLogger(run_dir, config, num_steps=10, start_step=start_step)


def steps(path: Path) -> list[tuple[str | None, int]]:
    return [(record.get("kind"), record["step"]) for record in read_records(path)]


def test_each_call_is_one_line_on_disk_at_once(tmp_path):
    with logger(tmp_path / "run") as log:
        log.log(0, {"reward/mean": 0.5, "optim/lr": math.nan, "policy/loss_sum": -math.inf})
        log.log(1, {"eval/greedy": 0.25}, kind="eval")
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "step": 0,
            "kind": "train",
            "reward/mean": 0.5,
            "optim/lr": None,
            "policy/loss_sum": None,
        },
        {"step": 1, "kind": "eval", "eval/greedy": 0.25},
    ]


def test_a_line_torn_by_a_crash_is_dropped_and_a_broken_one_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "kind": "train"}\n{"step": 1, "kind": "tr\xc3')
    assert steps(path) == [("train", 0)]
    with logger(tmp_path, start_step=1) as log:
        log.log(1, {})
    assert steps(path) == [("train", 0), ("train", 1)]
    path.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: no valid JSON"):
        read_records(path)


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    with logger(tmp_path) as log:
        log.log(0, {}, kind="eval")
        for step in range(4):
            log.log(step, {})
            log.log_rollouts(step, [{"index": 1}, {"index": 2}])
            log.log(step + 1, {}, kind="eval")
    with logger(tmp_path, start_step=2) as log:
        log.log(2, {})
    # the evaluation of the weights after two steps still holds
    train = [("train", 0), ("train", 1), ("train", 2)]
    evals = [("eval", 0), ("eval", 1), ("eval", 2)]
    assert sorted(steps(tmp_path / "metrics.jsonl")) == evals + train
    assert [step for _, step in steps(tmp_path / "rollouts.jsonl")] == [0, 0, 1, 1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl"]


def test_a_new_run_starts_its_files_anew(tmp_path):
    with logger(tmp_path) as log:
        log.log(0, {}, kind="eval")
        log.log(0, {})
    with logger(tmp_path):
        pass
    assert steps(tmp_path / "metrics.jsonl") == []


def test_a_crash_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    with logger(tmp_path) as log:
        for step in range(4):
            log.log(step, {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"), logger(tmp_path, start_step=2):
        pass
    assert len(steps(tmp_path / "metrics.jsonl")) == 4


def test_tensorboard_gets_the_finite_figures_and_forgets_steps_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LogConfig(tensorboard=True, progress="plain")
    with logger(tmp_path, config) as log:
        for step in range(3):
            log.log(step, {"reward/mean": step / 4, "optim/lr": math.nan})
    with logger(tmp_path, config, start_step=1) as log:
        log.log(1, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    values = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert values == [(0, 0.0), (1, 0.75)]


def test_wandb_is_asked_for_by_name_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    config = LogConfig(tensorboard=False, progress="plain", wandb_project="ours")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="log.wandb_project: needs the package wandb"):
        with logger(tmp_path, config):
            pass

    started, logged = [], []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            logged.append("closed")

        def log(self, metrics, step):
            logged.append((step, metrics))

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: started.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start_step in (0, 1, 0):
        with logger(tmp_path, config, start_step=start_step) as log:
            log.log(start_step, {"a": 1.0, "b": math.nan})
    assert logged == [
        (0, {"a": 1.0}),
        "closed",
        (1, {"a": 1.0}),
        "closed",
        (0, {"a": 1.0}),
        "closed",
    ]
    assert [options["project"] for options in started] == ["ours"] * 3
    first, resumed, anew = (options["id"] for options in started)
    assert first == resumed != anew


METRICS = {
    "reward/mean": 0.5,
    "reward/on_policy_mean": 0.45,
    "reward/hybrid_mean": 0.875,
    "prefix/low": 0.4,
    "prefix/high": 0.95,
    "policy/kept_frac": 0.2,
    "rollout/left_out_frac": 0.25,
    "policy/continuation_entropy_mean": math.nan,
    "time/step_s": 12.0,
    "time/generate_s": 8.25,
    "throughput/step_tokens_per_s": 12345.6,
}


def test_plain_progress_is_one_line_a_step(tmp_path, capsys):
    with logger(tmp_path) as log:
        log.message("base [model] built")
        log.log(0, {"eval/greedy": 0.25}, kind="eval")
        log.log(0, METRICS)
        log.log(9, {})
    message, evaluation, step, last = capsys.readouterr().out.splitlines()
    assert message == "base [model] built"
    assert evaluation == "evaluation after 0 steps: greedy 0.25"
    assert step == (
        "step 1/10 | reward 0.500 on-policy 0.450 hybrid 0.875 | prefix from 0.40 to 0.95 kept 0.20"
        " | rollouts left out 0.25 | time 12.0s generate 8.25s | speed 12,346 tokens/s | left 1m48s"
    )
    assert last == "step 10/10"


def test_rich_progress_shows_the_same_figures_and_messages_above(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    config = LogConfig(tensorboard=False, progress="rich")
    with logger(tmp_path, config) as log:
        log.message("base [model] built")
        log.log(0, METRICS)
    output = capsys.readouterr().out
    assert output.index("base [model] built") < output.index("step 1/10")
    for text in ("0.500 on-policy 0.450 hybrid 0.875", "12,346 tokens/s", "left 1m48s"):
        assert text in output
    assert "nan" not in output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.421, "0.42s"), (9.996, "10.0s"), (59.96, "1m00s"), (245, "4m05s"), (7379, "2h03m")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_format_rate():
    assert format_rate(12345.6) == "12,346 tokens/s"
