"""Demonstrations by a teacher: asked, kept, written, read again; stopped and gone on with."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefix_rft import cli
from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, save_config
from prefix_rft.data import FlatRows, begun_thought, load_problems, problems_from_rows
from prefix_rft.data.columns import DataError
from prefix_rft.evaluate import DemonstrateOptions, demonstrate, demonstrations
from prefix_rft.model import load_tokenizer
from prefix_rft.train import train
from tests.tiny import CHAT_TEMPLATE, make_model, make_run, make_tokenizer

NUM_TRAIN, NUM_EVAL = 8, 4
DEFAULTS = {"num_samples": 8, "temperature": 1.0, "chunk_size": 10}


def is_a_to_m(completions: list[str], **columns: object) -> list[float]:
    """Correct is what begins with a letter up to m, for every second problem."""
    return [
        float(text[:1] in set("abcdefghijklm") and int(answer) % 4 == 0)
        for text, answer in zip(completions, columns["answer"], strict=True)
    ]


def begins_as_taught(completions: list[str], **columns: object) -> list[float]:
    return [float(text[:1] in set("abcdefghijklm")) for text in completions]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """12 problems, of which 4 are held out; of the others every second can be solved."""
    return make_run(tmp_path, reward={"function": f"{__name__}:is_a_to_m"})


def options(folder: Path, name: str = "demos", **fields) -> DemonstrateOptions:
    out = folder / f"{name}.parquet"
    return DemonstrateOptions(out=out, **DEFAULTS | fields)


def made(config: Config, asked: DemonstrateOptions) -> list[dict]:
    demonstrate(config, config.model.path, asked)
    return pq.read_table(asked.out).to_pylist()


def samples(asked: DemonstrateOptions) -> list[dict]:
    files = sorted(asked.folder.glob("chunk-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def whole_and_correct(asked: DemonstrateOptions, index: int) -> list[str]:
    """The responses that can be demonstrations, the order is the teacher's."""
    return [
        sample["response"]
        for sample in samples(asked)
        if sample["index"] == index
        and sample["status"] == "correct"
        and sample["finish_reason"] == "stop"
        and len(sample["response"]) >= 2
    ]


def test_a_run_reads_what_was_made_and_holds_out_the_same(config, tmp_path: Path) -> None:
    asked = options(tmp_path)
    counts = demonstrate(config, config.model.path, asked)
    assert (counts.num_problems, counts.num_held_out) == (NUM_TRAIN, NUM_EVAL)
    assert sum(counts.statuses.values()) == 8 * NUM_TRAIN
    graded = samples(asked)
    assert counts.num_truncated == sum(s["finish_reason"] == "length" for s in graded) > 0
    solved = {sample["index"] for sample in graded if sample["status"] == "correct"}
    assert 0 < counts.num_solved == len(solved) <= NUM_TRAIN // 2

    tokenizer = load_tokenizer(config.model.path)
    before = load_problems(config, tokenizer)
    data = replace(config.data, path=str(asked.out))
    after = load_problems(replace(config, data=data), tokenizer)
    for first, second in ((before.train, after.train), (before.held_out, after.held_out)):
        assert [(p.prompt, p.answer) for p in first] == [(p.prompt, p.answer) for p in second]
    with_one = {p.index: p for p in after.train if p.demonstration_ids}
    assert len(with_one) == counts.num_kept > 0
    assert counts.num_other_ids == 0
    sampled = {(s["index"], s["response"]): s["response_ids"] for s in graded}
    for index, problem in with_one.items():
        assert list(problem.demonstration_ids) == sampled[index, problem.demonstration]
        assert config.rollout.max_response_length > len(problem.demonstration_ids)
        assert 1 not in problem.demonstration_ids  # <eos>
    total = sum(len(p.demonstration_ids) for p in with_one.values())
    assert counts.mean_tokens == total / len(with_one)


def test_held_out_problems_of_another_file_are_not_copied(config, tmp_path: Path) -> None:
    other = replace(config, data=replace(config.data, eval_path=config.data.path))
    asked = options(tmp_path)
    counts = demonstrate(other, config.model.path, asked)
    assert (counts.num_problems, counts.num_held_out) == (NUM_TRAIN + NUM_EVAL, 0)
    assert pq.read_table(asked.out).num_rows == NUM_TRAIN + NUM_EVAL


def test_a_fresh_base_learns_what_the_teacher_does(config, tmp_path: Path) -> None:
    asked = options(tmp_path, num_samples=64, keep="all", only_solved=True, chunk_size=256)
    rows = made(config, asked)
    demonstrations = [row["demonstration"] for row in rows if row["demonstration"]]
    assert len(demonstrations) > 8
    student = make_run(
        tmp_path / "student",
        data={"path": str(asked.out)},
        method={"name": "sft"},
        optimizer={"lr": 1e-2},
        eval={"num_samples": 32},
        trainer={"num_steps": 12, "prompts_per_step": 8, "prompts_per_update": 8},
        reward={"function": f"{__name__}:begins_as_taught"},
    )
    make_model(len(make_tokenizer()), seed=1).save_pretrained(student.model.path)
    summary = train(student)
    assert summary["trained"]["avg@32"] >= summary["base"]["avg@32"] + 0.3


@pytest.mark.parametrize("keep", ["shortest", "first", "all"])
def test_what_is_kept_of_the_correct_ones(config, tmp_path: Path, keep: str) -> None:
    asked = options(tmp_path, num_samples=16, keep=keep)
    rows = made(config, asked)
    several = 0
    for index in range(NUM_TRAIN):
        fit = whole_and_correct(asked, index)
        several += len({len(text) for text in fit}) > 1 and fit[0] != min(fit, key=len)
        expected = {"first": fit[:1], "all": fit, "shortest": sorted(fit, key=len)[:1]}[keep]
        prompt = f"add {index}+{index}"
        found = [row["demonstration"] for row in rows if row["prompt"] == prompt]
        assert found == (expected or [None])
    assert several  # else the three would be one


def test_unsolved_problems_can_be_left_out(config, tmp_path: Path) -> None:
    every = made(config, options(tmp_path))
    solved = made(config, options(tmp_path, "solved", only_solved=True))
    assert solved == [row for row in every[:NUM_TRAIN] if row["demonstration"]] + every[NUM_TRAIN:]
    assert len(every) == NUM_TRAIN + NUM_EVAL > len(solved)


def test_stopped_in_the_middle_it_ends_with_the_same_file(
    config, tmp_path: Path, monkeypatch
) -> None:
    whole, cut = options(tmp_path, "whole"), options(tmp_path, "cut")
    made(config, whole)
    grade_chunk, done = demonstrations.grade_chunk, []

    def stops(sampling, chunk, *args, **parts):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(chunk)
        return grade_chunk(sampling, chunk, *args, **parts)

    monkeypatch.setattr(demonstrations, "grade_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        made(config, cut)
    assert not cut.out.exists()
    done.clear()
    monkeypatch.setattr(
        demonstrations, "grade_chunk", lambda *a, **k: done.append(a[1]) or grade_chunk(*a, **k)
    )
    made(config, cut)
    assert done == [3, 4, 5, 6]
    assert cut.out.read_bytes() == whole.out.read_bytes()
    monkeypatch.setattr(demonstrations, "load_policy", None)  # a finished one loads no model
    before = cut.out.stat().st_mtime_ns
    assert demonstrate(config, config.model.path, cut).num_problems == NUM_TRAIN
    assert cut.out.stat().st_mtime_ns == before
    cut.out.unlink()  # from the same samples another choice is made
    assert len(made(config, replace(cut, only_solved=True))) < NUM_TRAIN + NUM_EVAL


@pytest.mark.slow
def test_killed_and_on_two_ranks_it_ends_with_the_same_file(config, tmp_path: Path) -> None:
    whole, killed = options(tmp_path, "whole"), options(tmp_path, "killed")
    made(config, whole)
    save_config(config, tmp_path / "config.toml")
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from prefix_rft.evaluate import demonstrations as module\n"
        "from prefix_rft.config import load_config\n"
        f"from {__name__} import options\n"
        "grade = module.grade_chunk\n"
        "def slow(*a, **k):\n"
        "    time.sleep(0.2); print('chunk', flush=True); return grade(*a, **k)\n"
        "module.grade_chunk = slow\n"
        f"config = load_config({str(tmp_path / 'config.toml')!r})\n"
        f"module.demonstrate(config, config.model.path, options(Path({str(tmp_path)!r}), 'killed'))"
    )
    (tmp_path / "work.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "work.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    for _ in range(2):  # in the middle of the second chunk
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.out.exists() and len(samples(killed)) == 10
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*command, tmp_path / "work.py"], env=environment, check=True)
    assert killed.out.read_bytes() == whole.out.read_bytes()


def test_a_file_of_something_else_is_refused(config, tmp_path: Path) -> None:
    asked = options(tmp_path)
    made(config, asked)
    with pytest.raises(ConfigError, match="--out: .* is made with keep 'shortest', got 'all'"):
        made(config, replace(asked, keep="all"))
    asked.out.unlink()
    with pytest.raises(ConfigError, match="--out: .* has samples with num_samples 8, got 2"):
        made(config, replace(asked, num_samples=2))
    asked.out.write_text("not parquet")
    with pytest.raises(ConfigError, match="--out: .* cannot be read"):
        made(config, asked)


def test_nothing_solved_is_said_and_nothing_written(config, tmp_path: Path, capsys) -> None:
    reward = replace(config.reward, correct_reward=2.0)
    save_config(replace(config, reward=reward), tmp_path / "config.toml")
    arguments = ["demonstrate", str(tmp_path), "--out", str(tmp_path / "demos.parquet")]
    (tmp_path / "base").rename(tmp_path / "model")  # the folder is that of a run
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert "no demonstration" in told.err and "0 of 8 problems solved" in told.out
    assert not (tmp_path / "demos.parquet").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "--num-samples: expected at least 1, got 0"),
        ({"keep": "longest"}, "--keep: expected one of shortest, first, all, got 'longest'"),
        ({"temperature": 0.0}, "--temperature: expected above 0 for several samples"),
        ({"top_p": 0.0}, "--top-p"),
        ({"max_tokens": 1}, "--max-tokens"),
        ({"chunk_size": 0}, "--chunk-size"),
        ({"out": Path("demos.jsonl")}, r"--out: expected a file \*.parquet"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DemonstrateOptions(**{"out": Path("demos.parquet")} | fields)


def test_data_without_a_usable_row_is_refused(config, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "", "answer": "1"}\n')
    with pytest.raises(DataError, match="data.path: .* no usable row"):
        made(config, options(tmp_path))
    assert not list(tmp_path.glob("demos*"))


def test_problems_that_the_teacher_has_no_room_for_are_kept_unasked(config, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    rows[2]["prompt"] = "add 2 and 2 together"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = Path(config.model.path) / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"max_position_embeddings": 14}))
    asked = options(tmp_path, num_samples=16)
    counts = demonstrate(config, config.model.path, asked)
    assert counts.num_unasked == 1
    assert {sample["index"] for sample in samples(asked)} == set(range(NUM_TRAIN)) - {2}
    assert max(sample["num_tokens"] for sample in samples(asked)) == 14 - len("add 0+0 ")
    assert pq.read_table(asked.out).to_pylist()[2]["demonstration"] is None


@pytest.mark.parametrize("begun", ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n"])
def test_a_begun_thought_stands_in_the_file_and_is_read_as_it_was_sampled(
    config, begun: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{{ messages[0].content }} {{ " + json.dumps(begun) + " }}"
    rows = [{"question": [{"role": "user", "content": "1 + 1"}], "answer": "2", "target": "x"}]
    data = replace(config.data, columns={"prompt": "question", "answer": "answer"})
    [problem], _ = problems_from_rows(
        rows, data, tokenizer, max_response_length=64, check_answers=False
    )
    for response in ("\n1 more</think> 2", "so\n</think>\n\n2", "<think> 2</think>2", " 2 "):
        if begun.endswith("</think>\n\n") and "</think>" in response:
            continue  # reading takes off all that such a template has ended
        text = begun_thought(problem.prompt) + response
        row = FlatRows([problem], data.columns).row(problem, text)
        assert row == {"prompt": rows[0]["question"], "answer": "2", "demonstration": text}
        [read], _ = problems_from_rows(
            [row], config.data, tokenizer, max_response_length=64, check_answers=False
        )
        expected = tokenizer(response, add_special_tokens=False)["input_ids"]
        if begun == "" and response.startswith("<think>"):
            assert read.demonstration == response
        assert list(read.demonstration_ids) == expected


def test_the_file_has_the_thought_that_the_template_begins(tmp_path: Path) -> None:
    config = make_run(
        tmp_path,
        reward={"function": f"{__name__}:is_a_to_m"},
        model={"chat_template": CHAT_TEMPLATE + "<think>"},
    )
    rows = made(config, options(tmp_path))
    texts = [row["demonstration"] for row in rows if row["demonstration"]]
    assert texts and all(text.startswith("<think>") for text in texts)


def test_columns_are_kept_but_for_those_of_other_layouts(config) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "1 + 1"}],
            "reward_model": {"ground_truth": "2"},
            "target": [{"role": "assistant", "content": "it is 2"}],
            "tier": "easy",
        }
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }} "
    [problem], _ = problems_from_rows(
        rows, config.data, tokenizer, max_response_length=64, check_answers=False
    )
    assert FlatRows([problem], {}).row(problem, None) == {
        "prompt": rows[0]["prompt"],
        "answer": "2",
        "demonstration": None,
        "tier": "easy",
    }
