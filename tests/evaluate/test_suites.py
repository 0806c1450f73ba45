"""Benchmarks: what is asked, sampled, kept, told; killed and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import DataConfig, save_config
from prefix_rft.data import problems_from_rows
from prefix_rft.data.columns import DataError
from prefix_rft.evaluate import chunks, paired, suite_run
from prefix_rft.evaluate.prompts import find_prompt, prompt_names
from prefix_rft.evaluate.statistics import Estimate, pass_at_k
from prefix_rft.evaluate.suites import SuiteOptions, find_suites
from tests.tiny import CHAT_TEMPLATE, make_run, make_tokenizer

NUM_AIME, NUM_MATH = 3, 5
PROTOCOL = {"num_samples": 4, "max_tokens": 12, "chunk_size": 5}


@pytest.fixture
def config(tmp_path: Path):
    """A tiny run's configuration; its base stands for a model, and a file for two benchmarks."""
    rows = [
        {"data_source": source, "problem": f"{source} {i}", "answer": str(i)}
        for source, count in (("aime", NUM_AIME), ("math", NUM_MATH))
        for i in range(count)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "benchmarks.jsonl").write_text(lines)
    return make_run(tmp_path)


def options(config, names: str = "aime24,math500", **fields) -> SuiteOptions:
    data = str(Path(config.model.path).parent / "benchmarks.jsonl")
    return SuiteOptions(names=names, data=data, **PROTOCOL | fields)


def evaluated(config, folder: Path, **fields):
    return suite_run.evaluate_suites(config, config.model.path, options(config, **fields), folder)


def texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("samples_*.jsonl")}


def test_two_suites_end_to_end(config, tmp_path: Path) -> None:
    aime, math = evaluated(config, tmp_path / "out", greedy=False)
    assert (aime.num_problems, math.num_problems) == (NUM_AIME, NUM_MATH)
    assert set(aime.figures) == {"avg@4", "pass@4"}
    samples = [
        json.loads(line)
        for line in texts(tmp_path / "out")["samples_math500.jsonl"].split("\n")[:-1]
    ]
    assert [(s["index"], s["sample"]) for s in samples] == [
        (NUM_AIME * 0 + i, k) for i in range(NUM_MATH) for k in range(4)
    ]
    assert all(sample["num_tokens"] <= 12 for sample in samples)
    counts = [
        sum(s["status"] == "correct" for s in samples if s["index"] == i) for i in range(NUM_MATH)
    ]
    assert list(math.num_correct.values()) == counts
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["results"][1]["figures"]["avg@4"]["value"] == np.mean(counts) / 4
    assert results["average"]["value"] == pytest.approx(
        (aime.figures["avg@4"].value + math.figures["avg@4"].value) / 2
    )
    page = (tmp_path / "out/index.html").read_text()
    assert "math500" in page and samples[0]["answer"] in page


def test_what_is_done_is_not_done_again_and_interruptions_change_nothing(
    config, tmp_path: Path, monkeypatch
) -> None:
    evaluated(config, tmp_path / "whole", greedy=True)
    sample_chunk, done = suite_run.sample_chunk, []

    def stops(sampling, chunk, **parts):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(chunk)
        return sample_chunk(sampling, chunk, **parts)

    monkeypatch.setattr(suite_run, "sample_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluated(config, tmp_path / "cut", greedy=True)
    monkeypatch.setattr(suite_run, "sample_chunk", sample_chunk)
    evaluated(config, tmp_path / "cut", greedy=True)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert "samples_aime24_greedy.jsonl" in texts(tmp_path / "cut")
    monkeypatch.setattr(suite_run, "load_policy", None)  # a finished one loads no model
    evaluated(config, tmp_path / "cut", greedy=True)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_numbers(config, tmp_path: Path) -> None:
    evaluated(config, tmp_path / "whole")
    save_config(config, tmp_path / "config.toml")
    code = (
        "import sys, time; from prefix_rft.config import load_config\n"
        "from prefix_rft.evaluate import suite_run\n"
        "from tests.evaluate.test_suites import options\n"
        "from pathlib import Path\n"
        "sample = suite_run.sample_chunk\n"
        "def slow(*a, **k):\n"
        "    time.sleep(0.2); print('chunk', flush=True); return sample(*a, **k)\n"
        "suite_run.sample_chunk = slow\n"
        f"config = load_config({str(tmp_path / 'config.toml')!r})\n"
        "suite_run.evaluate_suites(config, config.model.path, options(config), "
        f"Path({str(tmp_path / 'killed')!r}))\n"
    )

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ
        )

    for _ in range(3):
        process = start()
        for _ in range(2):  # in the middle of the second chunk of this attempt, if there is one
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start().wait() == 0
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole")


def test_the_command_evaluates_and_compares(config, tmp_path: Path, capsys) -> None:
    from prefix_rft.cli import main

    shutil.copytree(config.model.path, tmp_path / "other")
    data = str(tmp_path / "benchmarks.jsonl")
    arguments = ["--suite", "aime24,math500", "--suite-data", data, "--num-samples", "2"]
    arguments += ["--max-tokens", "8", "--pass-at", "2", "--prompt", "none", "--greedy"]
    models = [config.model.path, str(tmp_path / "other")]
    assert main(["eval", *models, *arguments, "--out", str(tmp_path / "evals")]) == 0
    out = capsys.readouterr().out
    assert "avg@2" in out and "pass@2" in out and "math500_greedy" in out
    assert "paired over problems" in out and "+0.0 – +0.0" in out  # the same model twice
    assert main(["eval", *models, *arguments, "--pass-at", "4"]) == 2
    assert "--pass-at: expected k from 1 to the 2 samples" in capsys.readouterr().err
    assert main(["eval", "--suite", "list"]) == 0
    assert "olympiad" in capsys.readouterr().out


def test_samples_of_another_protocol_are_refused(config, tmp_path: Path) -> None:
    evaluated(config, tmp_path / "out", names="aime24")
    with pytest.raises(ConfigError, match="--out: .* has samples with temperature 0.6, got 0.9"):
        evaluated(config, tmp_path / "out", names="aime24", temperature=0.9)


def test_a_response_is_cut_to_the_models_positions_and_that_is_told(config, tmp_path: Path) -> None:
    file = Path(config.model.path) / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"max_position_embeddings": 16}))
    [result] = evaluated(config, tmp_path / "out", names="aime24")
    assert result.num_cut == NUM_AIME and max(result.lengths) <= 16 - len("aime 0 ")


def test_greedy_is_a_suite_of_its_own_and_a_limit_is_spread(config, tmp_path: Path) -> None:
    sampled, greedy = evaluated(config, tmp_path / "out", names="math500", greedy=True, limit=2)
    assert greedy.label == "math500_greedy" and set(greedy.figures) == {"greedy"}
    assert list(sampled.num_correct) == [0, 2]


def test_paired_differences() -> None:
    pair = paired.Paired(
        label="x",
        is_sampled=True,
        rows=np.arange(4),
        first=np.array([0, 0.5, 1, 0.5]),
        second=np.array([1, 0.5, 0.5, 1]),
    )
    [row] = paired.table_rows([pair])
    assert row[1:4] == ("50.0", "75.0", "+25.0")
    # Of 1, 0, -1/2, 1/2: standard deviation sqrt(1.25 / 3), over sqrt(4).
    assert row[4] == f"{100 * (1.25 / 3) ** 0.5 / 2:.1f}"
    assert paired.changes([pair]) == [
        "x: rows that the second solves more often: 2 (0, 3); less often: 1 (2)"
    ]


def test_the_average_weighs_suites_alike() -> None:
    mean = Estimate.of_suites([np.array([1.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])])
    assert mean.value == 0.75
    assert mean.stderr == pytest.approx((1 / 3 / 4) ** 0.5 / 2)


def test_pass_at_k_is_unbiased() -> None:
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": "aime26"}, "--suite: expected some of math, aime24"),
        ({"names": "math500", "pass_at": (8,)}, "--pass-at: expected k from 1 to the 1 samples"),
        ({"names": "math", "temperature": 0.0}, "--temperature: expected above 0"),
        ({"names": "math", "top_p": 1.5}, "--top-p"),
        ({"names": "math", "limit": 0}, "--limit"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SuiteOptions(**fields)


def test_a_file_without_the_suite_or_a_usable_row_is_refused(config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--suite-data: expected rows of minerva"):
        evaluated(config, tmp_path / "out", names="minerva")
    file = tmp_path / "benchmarks.jsonl"
    file.write_text('{"data_source": "aime", "problem": "", "answer": "1"}\n')
    with pytest.raises(DataError, match="no usable row"):
        evaluated(config, tmp_path / "out", names="aime24")
    file.write_text('{"data_source": "aime", "answer": "1"}\n')
    with pytest.raises(DataError, match="columns"):
        evaluated(config, tmp_path / "out", names="aime24")


def test_sets_and_lists_name_each_suite_once() -> None:
    assert [suite.name for suite in find_suites("amc, math")][:2] == ["amc", "aime24"]
    assert len(find_suites("amc,math")) == 6


def test_each_prompt_gives_these_texts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    message = [{"role": "user", "content": "1 + 1 = ?"}]
    assert prompt_names() == ["none", "qwen-math", "r1-zero", "think"]
    shown = {}
    for name in prompt_names():
        prompt = find_prompt(name)
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        shown[name] = prompt.tokenizer(tokenizer).apply_chat_template(
            system + message, tokenize=False, add_generation_prompt=True
        )
    assert shown["none"] == "1 + 1 = ? "
    assert shown["qwen-math"] == (
        "Please reason step by step, and put your final answer within \\boxed{}. 1 + 1 = ? "
    )
    assert shown["r1-zero"].endswith("\nUser: 1 + 1 = ?\nAssistant: <think>")
    assert "<think> reasoning process here </think>" in shown["r1-zero"]
    assert '"<think>\n {thoughts} </think>\n"' in shown["think"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="--prompt: expected one of none, qwen-math"):
        find_prompt("deepseek")


def test_a_part_written_file_is_no_chunk(tmp_path: Path) -> None:
    sampling = chunks.Sampling(
        problems=[None] * 3,
        num_samples=2,
        temperature=1.0,
        top_p=1.0,
        max_tokens=4,
        position_limit=None,
        answer_pattern="boxed",
        chunk_size=4,
        seed=0,
    )
    (tmp_path / ".partial-1-chunk-00000.jsonl").write_text("{")
    assert chunks.missing_chunks(tmp_path, sampling) == [0, 1]
    assert len(sampling.picks(0)) == 4 and len(sampling.picks(1)) == 2
    assert sampling.chunk_seed(0) != replace(sampling, temperature=0.5).chunk_seed(0)


def test_each_prompt_gives_exactly_the_ids_of_its_text() -> None:
    """What the model reads, from the row of a benchmark, one id a character here."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    before = find_prompt("r1-zero").whole[0]
    texts = {
        "none": "1 + 2 ",
        "qwen-math": find_prompt("qwen-math").system + " 1 + 2 ",
        "think": find_prompt("think").system + " 1 + 2 ",
        "r1-zero": before + "1 + 2\nAssistant: <think>",
    }
    ids = {character: tokenizer.convert_tokens_to_ids(character) for character in "+12 "}
    for name, text in texts.items():
        prompt = find_prompt(name)
        [problem], _ = problems_from_rows(
            [{"problem": "1 + 2", "answer": "3"}],
            DataConfig(system_prompt=prompt.system, max_prompt_tokens=4096),
            prompt.tokenizer(tokenizer),
            max_response_length=8,
            held_out=True,
        )
        assert problem.prompt_ids == tuple(map(tokenizer.convert_tokens_to_ids, text)), name
        if name == "none":
            assert problem.prompt_ids == tuple(ids[character] for character in "1 + 2 ")
