import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from prefix_rft import cli
from prefix_rft.checks import UserError
from prefix_rft.config import Config, save_config
from prefix_rft.config.data_sections import DataConfig
from prefix_rft.train.interrupt import Stopped


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[trainer]\nnum_steps = 7\n')
    return str(path)


@pytest.fixture
def calls(monkeypatch) -> list:
    """The calls that stand-ins for the heavy modules receive."""
    calls = []

    def module(name: str, **functions) -> None:
        stand_in = types.ModuleType(name)
        vars(stand_in).update(functions)
        monkeypatch.setitem(sys.modules, name, stand_in)

    def list_checkpoints(run_dir: Path) -> list[Path]:
        return sorted((run_dir / "checkpoints").glob("step-*"))

    def train(config: Config, resume: bool) -> dict:
        calls.append((config, resume))
        return {"base": {"greedy": 0.25}, "trained": {"greedy": 0.75}}

    module(
        "prefix_rft.train",
        Stopped=Stopped,
        list_checkpoints=list_checkpoints,
        train=train,
        evaluate_model=lambda config, path: calls.append((config, path)) or {"greedy": 0.5},
        export_checkpoint=lambda *arguments: calls.append(arguments),
    )
    return calls


def test_options_override_the_file_and_both_spellings_count(toml, calls):
    arguments = "--trainer.num_steps 20 --prefix_rft.schedule uniform --loss.prefix-clip 0.1 0.3"
    assert cli.main(["train", toml, *arguments.split(), "--log.no-tensorboard"]) == 0
    [(config, resume)] = calls
    assert config.name == "mine" and not resume
    assert config.trainer.num_steps == 20
    assert config.prefix_rft.schedule == "uniform"
    assert config.loss.prefix_clip == (0.1, 0.3)
    assert not config.log.tensorboard
    cli.main(["train", toml, "--trainer.num-steps", "21", "--resume"])
    assert calls[1][0].trainer.num_steps == 21 and calls[1][1]
    cli.main(["train", toml])
    assert calls[2][0].trainer.num_steps == 7


def test_train_ends_with_the_table_of_base_and_trained(toml, calls, capsys):
    assert cli.main(["train", toml]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "greedy" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["greedy", "25.0%", "75.0%", "+50.0"]


def test_an_unknown_option_names_the_nearest_and_exits_with_2(toml, calls, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", toml, "--trainer.num-stps", "20"])
    assert exit_.value.code == 2 and not calls
    error = capsys.readouterr().err
    assert "--trainer.num-stps" in error and "--trainer.num-steps" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--trainer.num-steps", "0"],
            "error: trainer.num_steps: expected a whole number above 0, got 0\n",
        ),
        (["--optimizer.lr", "nan"], "error: optimizer.lr: expected a number above 0, got nan\n"),
    ],
)
def test_a_refused_option_is_one_line(toml, calls, capsys, arguments, message):
    assert cli.main(["train", toml, *arguments]) == 2
    assert capsys.readouterr().err == message and not calls


def test_an_option_of_the_wrong_type_names_it(toml, calls, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", toml, "--trainer.num-steps", "many"])
    assert exit_.value.code == 2 and not calls
    error = capsys.readouterr().err
    assert "--trainer.num-steps" in error and "'many'" in error and "INT" in error


def test_an_unknown_key_in_the_file_is_one_line(tmp_path, calls, capsys):
    path = tmp_path / "bad.toml"
    path.write_text("[prefix_rft]\nshedule = 'uniform'\n")
    assert cli.main(["train", str(path)]) == 2
    expected = (
        f"error: {path}: unknown key 'prefix_rft.shedule'; did you mean 'prefix_rft.schedule'?\n"
    )
    assert capsys.readouterr().err == expected and not calls


def test_the_configuration_must_come_first(toml, calls, capsys):
    # its values are the defaults of the options and would be silently lost
    assert cli.main(["train", "--resume", toml]) == 2
    assert "expected right after 'train'" in capsys.readouterr().err and not calls
    assert cli.main(["doctor", "--seed", "1", toml]) == 2


def test_a_run_folder_with_checkpoints_needs_resume(toml, calls, capsys, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-000005").mkdir(parents=True)
    assert cli.main(["train", toml, "--output-dir", str(run_dir)]) == 2
    assert "already contains checkpoints" in capsys.readouterr().err and not calls
    assert cli.main(["train", toml, "--output-dir", str(run_dir), "--resume"]) == 0
    assert calls[0][1] is True


def test_eval_takes_a_run_folder_with_its_configuration_or_a_model(calls, capsys, tmp_path):
    save_config(Config(name="mine", seed=5), tmp_path / "config.toml")
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "no final model" in capsys.readouterr().err and not calls
    (tmp_path / "model").mkdir()
    assert cli.main(["eval", str(tmp_path), "--eval.num-samples", "4"]) == 0
    assert "0.5" in capsys.readouterr().out
    config, path = calls[0]
    assert (config.seed, config.eval.num_samples) == (5, 4)
    assert path == str(tmp_path / "model")
    cli.main(["eval", "someone/a-model", "--data.path", "rows.parquet"])
    assert calls[1] == (Config(data=DataConfig(path="rows.parquet")), "someone/a-model")


def test_export_passes_folder_step_and_target(calls):
    cli.main(["export", "runs/x", "--step", "20", "out"])
    cli.main(["export", "runs/x", "out"])
    assert calls == [(Path("runs/x"), 20, Path("out")), (Path("runs/x"), None, Path("out"))]


def test_user_errors_are_one_line_and_all_others_keep_their_traceback(
    toml, calls, monkeypatch, capsys
):
    def run(error: BaseException) -> int:
        def train(config: Config, resume: bool) -> None:
            raise error

        monkeypatch.setattr(sys.modules["prefix_rft.train"], "train", train)
        return cli.main(["train", toml])

    assert run(UserError("no such data")) == 2
    assert capsys.readouterr().err == "error: no such data\n"
    assert run(KeyboardInterrupt()) == 130
    assert run(Stopped(signal.SIGINT)) == 130
    assert run(Stopped(signal.SIGTERM)) == 0
    with pytest.raises(ValueError, match="ours"):
        run(ValueError("ours"))


def test_help_is_fast_and_loads_no_torch():
    code = (
        "import sys\n"
        "from prefix_rft.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    start = os.times().children_user
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("train", "eval", "export", "report", "doctor", "compare"):
        assert command in result.stdout
    assert os.times().children_user - start < 1.0  # seconds of CPU time


def test_what_torchao_says_when_it_is_imported_is_not_shown(toml, calls, caplog):
    cli.main(["train", toml])
    for name, text in (
        ("torchao", "Failed to load /x/_C_mxfp8.so: Could not load this library"),
        ("torch.utils._pytree", "%s is an Enum subclass and is now natively supported by ..."),
        ("torchao", "a warning that matters"),
    ):
        logging.getLogger(name).warning(text, *["Kind"] * text.count("%"))
    assert caplog.messages == ["a warning that matters"]
