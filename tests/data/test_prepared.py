"""Rows of a file are prepared once: the same problems as in memory, whatever befalls the cache."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import multiprocess
import pytest
from transformers import AddedToken

from prefix_rft.config.data_sections import DataConfig
from prefix_rft.data import cache, prepared, problems
from prefix_rft.data.columns import DataError
from prefix_rft.data.problems import keep_demonstrations, load_problems, problems_from_rows
from tests.data.shapes import (
    EMPTY,
    OPENR1,
    TEMPLATE,
    UNUSABLE,
    VERL,
    bpe,
    flat,
    make_tokenizer,
    messages,
    run_config,
    write_jsonl,
)

TEXTS = [row for row in UNUSABLE if isinstance(row["prompt"], str)]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Of the prepared rows; those of any size are kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(problems, "_LEAST_BYTES", 0)
    return tmp_path / "cache" / "prefix-rft"


@pytest.fixture
def num_built(monkeypatch) -> list[str | None]:
    """Grows with every preparation by the file that is written."""
    made, prepare_table = [], cache.prepare_table
    monkeypatch.setattr(
        cache, "prepare_table", lambda *given: made.append(given[-1]) or prepare_table(*given)
    )
    return made


def file_of(tmp_path, rows) -> datasets.Dataset:
    """The rows as a dataset of a file, which has the same fingerprint every time."""
    path = tmp_path / "rows.parquet"
    if not path.exists():
        datasets.Dataset.from_list(rows).to_parquet(path)
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "rows"))


def build(rows, tokenizer, *, max_response_length=1000, held_out=False, **config):
    return problems_from_rows(
        rows,
        DataConfig(**config),
        tokenizer,
        max_response_length=max_response_length,
        held_out=held_out,
    )


def ending(end: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<a>", f"<a>{end}")
    return tokenizer


THOUGHTS = ["<think>\nhm</think>1", "hm</think>it is 1", EMPTY + "it is 1", "<think>hm", None]
LIMITS = {"max_prompt_tokens": 50, "max_response_length": 20}


@pytest.mark.parametrize(
    ("rows", "tokenizer", "options"),
    [
        ([VERL, VERL | {"target": None}] * 3, make_tokenizer(), {}),
        ([OPENR1, OPENR1 | {"correctness_math_verify": [False] * 4}], make_tokenizer(), {}),
        (
            [{"question": "6*3?", "answer": "6*3 = <<6*3=18>>18\n#### 1,018"}] * 5
            + [{"question": "6*3?", "answer": "it is 18"}],
            make_tokenizer(),
            {"system_prompt": "be brief"},
        ),
        ([row | {"answer": str(row["answer"])} for row in TEXTS], make_tokenizer(), LIMITS),
        ([row for row in UNUSABLE if isinstance(row["prompt"], list)] * 2
         + [{"prompt": messages(("user", "a")), "answer": "1"}], make_tokenizer(), {}),
        ([{"prompt": "q", "answer": x} for x in (1.5, float("nan"), None)], make_tokenizer(), {}),
        *(
            ([{"prompt": "a", "answer": "1", "demonstration": x} for x in THOUGHTS], at_end, {})
            for at_end in map(ending, ("<think>\n", EMPTY))
        ),
        (
            [{"prompt": "ax", "answer": "1", "demonstration": x} for x in ("ab:", "bab:", "ba:")],
            bpe((">", "b"), ("b", "a"), ("ba", "b")),
            {"strict": True},
        ),
        ([{"q": "1?", "m": {"gold": 2}, "why": "so"}] * 3, make_tokenizer(),
         {"columns": {"prompt": "q", "answer": "m.gold", "demonstration": "why"}}),
        (flat(700), make_tokenizer(), {}),
        (flat(9), make_tokenizer(), {"held_out": True}),
    ],
)  # fmt: skip
def test_what_is_kept_on_disk_is_what_is_made_in_memory(
    rows, tokenizer, options, tmp_path, monkeypatch, num_built
):
    data = file_of(tmp_path, rows)
    expected, report = build(list(data), tokenizer, **options)
    assert not num_built
    made = build(data, tokenizer, **options)
    monkeypatch.delattr(cache, "prepare_table")
    again = build(file_of(tmp_path, rows), tokenizer, **options)
    assert len(num_built) == 1
    for found, its_report in (made, again):
        assert list(found) == list(expected) and its_report == report
        assert [type(p.prompt_ids) for p in found] == [tuple] * len(expected)
        assert found.fingerprint() == expected.fingerprint()
        skimmed = []
        found.accepted(lambda problem, seen=skimmed: seen.append(problem) or True)
        for lean, problem in zip(skimmed, expected, strict=True):
            ids = {"prompt_ids": lean.prompt_ids[:]}
            ids["demonstration_ids"] = () + lean.demonstration_ids
            assert replace(lean, **ids, columns={}) == replace(problem, columns={})
            assert dict(lean.columns) == problem.columns
            assert len(lean.demonstration_ids) == len(problem.demonstration_ids)


def test_several_processes_make_the_same(tokenizer, tmp_path, monkeypatch, folder):
    rows = [row | {"answer": str(row["answer"])} for row in TEXTS] * 4
    data = file_of(tmp_path, rows)
    expected, report = build(list(data), tokenizer, **LIMITS)
    monkeypatch.setattr(prepared, "_ROWS_PER_PROCESS", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    environment = os.environ
    found, its_report = build(data, tokenizer, **LIMITS)
    assert found == expected and its_report == report
    assert len(list(folder.glob("*/rows*.arrow"))) == 3
    assert os.environ is environment and os.environ["TOKENIZERS_PARALLELISM"] == "true"
    refused = [*flat(60), {"prompt": messages(("tool", "t"), ("user", "a")), "answer": "1"}]
    refused = [row | {"prompt": row["prompt"] if isinstance(row["prompt"], list)
                      else messages(("user", "a"))} for row in refused]  # fmt: skip
    (tmp_path / "rows.parquet").unlink()
    with pytest.raises(DataError, match=r"row 60: .* refuses messages of \['tool', 'user'\]"):
        build(file_of(tmp_path, refused), tokenizer)
    assert not list(folder.glob(".partial*"))


def test_a_run_is_the_same_from_disk(tokenizer, tmp_path, monkeypatch):
    rows = [*flat(40), *(row | {"demonstration": None} for row in flat(9))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for data in (
        {"num_eval": 7, "demonstration_fraction": 0.3},
        {"num_eval": 7, "demonstration_fraction": 0.3, "seed": 5},
        {"num_eval": 5, "eval_path": path, "eval_split": "test"},
    ):
        config = run_config(path=path, **data)
        monkeypatch.setattr(problems, "_LEAST_BYTES", 2**40)
        expected = load_problems(config, tokenizer)
        monkeypatch.setattr(problems, "_LEAST_BYTES", 0)
        found = load_problems(config, tokenizer)
        assert found == expected
        assert [list(each) for each in found[:2]] == [list(each) for each in expected[:2]]
        assert found.train.fingerprint() == expected.train.fingerprint()
        assert found.train.num_demonstrations == expected.train.num_demonstrations

        def accepts(problem):
            return problem.index % 3 == 0 and bool(problem.demonstration_ids)

        shown = [problem for problem in expected.train if accepts(problem)]
        assert shown and list(found.train.accepted(accepts)) == shown
        assert list(found.train[::-1].accepted(accepts)) == shown[::-1]
        assert found.train.accepted(accepts).num_demonstrations == len(shown)


def test_a_digest_tells_other_problems_and_another_order(tokenizer, tmp_path):
    def digest(rows, **options):
        return build(rows, tokenizer, **options)[0].fingerprint()

    rows = flat(5)
    others = [
        rows[:4],
        rows[::-1],
        [*rows[:4], rows[4] | {"answer": "5"}],
        [*rows[:4], rows[4] | {"prompt": "q5"}],
        [*rows[:4], rows[4] | {"demonstration": "so it is 5"}],
        [*rows[:4], rows[4] | {"demonstration": None}],
    ]
    digests = [digest(each) for each in (rows, *others)]
    assert len(set(digests)) == len(digests)
    on_disk, _ = build(file_of(tmp_path, rows), tokenizer)
    assert on_disk.fingerprint() == digests[0]
    assert on_disk[::-1].fingerprint() == digests[2] and on_disk[:4].fingerprint() == digests[1]
    bare = build([row | {"demonstration": None} for row in rows], tokenizer)[0].fingerprint()
    assert keep_demonstrations(on_disk, 0.0, seed=1).fingerprint() == bare != digests[0]


def test_the_key_has_all_that_decides(tokenizer, tmp_path, num_built):
    rows = [row | {"q": "other", "a": "3"} for row in flat(4)]
    templated, added = make_tokenizer(), make_tokenizer()
    templated.chat_template = TEMPLATE.replace("<a>", "<b>")
    added.add_tokens([AddedToken("so it")])
    named = {"prompt": "q", "answer": "a"}
    variants = [
        (tokenizer, {}),
        (templated, {}),
        (added, {}),
        (tokenizer, {"system_prompt": "hm"}),
        (tokenizer, {"max_prompt_tokens": 99}),
        (tokenizer, {"max_response_length": 99}),
        (tokenizer, {"held_out": True}),
        (tokenizer, {"columns": named}),
        (tokenizer, {"columns": named | {"demonstration": "prompt"}}),
    ]
    for count, (its_tokenizer, options) in enumerate(variants, start=1):
        for _ in range(2):
            build(file_of(tmp_path, rows), its_tokenizer, **options)
            assert len(num_built) == count
    problems_from_rows(
        file_of(tmp_path, rows), DataConfig(), tokenizer, max_response_length=1000,
        check_answers=False,
    )  # fmt: skip
    assert len(num_built) == len(variants) + 1
    data = file_of(tmp_path, rows)
    layouts = [
        problems.Recipe(
            layout=problems.find_map(data, named, key="data.columns"), columns=named,
            tokenizer=tokenizer, system_prompt=None, held_out=False, max_prompt_tokens=9,
            max_demonstration_tokens=9,
        )
        for named in (named, {"answer": "q", "prompt": "a"})
    ]  # fmt: skip
    first, second = (cache.cache_key(data, each, check_answers=True) for each in layouts)
    assert first != second
    datasets.Dataset.from_list(flat(5)).to_parquet(tmp_path / "rows.parquet")
    os.utime(tmp_path / "rows.parquet", (1, 1))
    assert len(build(file_of(tmp_path, rows), tokenizer)[0]) == 5
    assert len(num_built) == len(variants) + 2


def test_a_tokenizer_that_was_used_is_the_same(tokenizer, tmp_path, num_built):
    build(file_of(tmp_path, flat(3)), tokenizer)
    tokenizer.pad_token = None
    tokenizer(["ab"], truncation=True, max_length=1)
    build(file_of(tmp_path, flat(3)), tokenizer)
    assert len(num_built) == 1


def damage_end(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def damage_inside(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows.arrow", damage_end),
        ("rows.arrow", damage_inside),
        ("rows.arrow", Path.unlink),
        ("prepared.json", damage_end),
        ("prepared.json", lambda file: file.write_text("{}")),
        ("prepared.json", Path.unlink),
    ],
)
def test_what_is_damaged_is_made_again(tokenizer, tmp_path, folder, num_built, name, damage):
    expected = list(build(file_of(tmp_path, flat(30)), tokenizer)[0])
    [file] = folder.glob(f"*/{name}")
    damage(file)
    partial = folder / f".partial-{file.parent.name}"  # of a process that was killed
    partial.mkdir()
    (partial / "rows.arrow").write_text("half")
    assert list(build(file_of(tmp_path, flat(30)), tokenizer)[0]) == expected
    assert len(num_built) == 2 and not partial.exists()
    assert list(build(file_of(tmp_path, flat(30)), tokenizer)[0]) == expected
    assert len(num_built) == 2


def test_without_a_cache_it_works_with_a_notice(tokenizer, tmp_path, folder, num_built):
    data = file_of(tmp_path, UNUSABLE[:3])
    expected, report = build(UNUSABLE[:3], tokenizer)
    assert report.notice is None
    folder.parent.mkdir()
    folder.write_text("no folder can be made here")
    found, report = build(data, tokenizer)
    assert list(found) == list(expected) and found.fingerprint() == expected.fingerprint()
    assert num_built == [None]
    [notice] = report.lines()[1:]
    assert "the cache cannot be used: " in notice and "\n" not in notice and str(folder) in notice


def test_a_full_disk_leaves_nothing_behind(tokenizer, tmp_path, folder, monkeypatch):
    prepare_table = cache.prepare_table

    def fails(rows, recipe, fingerprint, file):
        if file is not None:
            prepare_table(rows, recipe, fingerprint, file)
            raise OSError(errno.ENOSPC, "No space left on device")
        return prepare_table(rows, recipe, fingerprint, file)

    monkeypatch.setattr(cache, "prepare_table", fails)
    found, report = build(file_of(tmp_path, flat(3)), tokenizer)
    assert [p.answer for p in found] == ["0", "1", "2"]
    assert "No space left on device" in report.notice
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_cache_that_is_read_only_is_read(tokenizer, tmp_path, folder, monkeypatch, num_built):
    build(file_of(tmp_path, flat(3)), tokenizer)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "_locked", refuse)
    found, report = build(file_of(tmp_path, flat(3)), tokenizer)
    assert len(found) == 3 and report.notice is None and len(num_built) == 1
    found, report = build(file_of(tmp_path, flat(3)), tokenizer, max_prompt_tokens=99)
    assert len(found) == 3 and "Permission denied" in report.notice


def test_processes_that_start_together_prepare_once(tokenizer, tmp_path, monkeypatch):
    trace, prepare_table = tmp_path / "trace", cache.prepare_table

    def slow(*given):
        with trace.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        return prepare_table(*given)

    monkeypatch.setattr(cache, "prepare_table", slow)
    data = file_of(tmp_path, flat(30))
    context = multiprocess.get_context("fork")
    with context.Pool(4) as pool:
        digests = pool.map(lambda _: build(data, tokenizer)[0].fingerprint(), range(4), 1)
    assert trace.read_text() == "built\n"
    assert set(digests) == {build(flat(30), tokenizer)[0].fingerprint()}


SLOW = """
import os, signal, sys, time
import datasets
from prefix_rft.config.data_sections import DataConfig
from prefix_rft.data import prepared, problems
from tests.data.shapes import make_tokenizer

class Stopped(BaseException):
    pass

def stop(number, frame):
    raise Stopped

def slow(outcomes):
    open(os.path.join(folder, f"pid-{os.getpid()}"), "w").close()
    time.sleep(60)

folder = sys.argv[1]
datasets.config.HF_DATASETS_CACHE = os.path.join(folder, "cache")
problems._LEAST_BYTES, prepared._ROWS_PER_PROCESS, prepared._table = 0, 10, slow
os.sched_getaffinity = lambda _: range(2)
signal.signal(signal.SIGTERM, stop)
rows = datasets.Dataset.from_parquet(folder + "/rows.parquet", cache_dir=folder + "/rows")
try:
    problems.problems_from_rows(rows, DataConfig(), make_tokenizer(), max_response_length=1000)
except Stopped:
    os._exit(7)  # without the end of an interpreter that has much to free
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 7), (signal.SIGKILL, -9)])
def test_a_start_that_is_ended_leaves_no_process_and_no_lock(
    tokenizer, tmp_path, folder, number, status
):
    data = file_of(tmp_path, flat(30))
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], cwd=ROOT)
    helpers = []
    try:
        while len(helpers) < 2:
            assert process.poll() is None
            time.sleep(0.05)
            helpers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("pid-*")]
        process.send_signal(number)
        assert process.wait(60) == status
    finally:
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, helpers))
    assert bool(list(folder.glob(".partial-*"))) == (number == signal.SIGKILL)
    assert list(build(data, tokenizer)[0]) == list(build(list(data), tokenizer)[0])
    assert not list(folder.glob(".partial-*"))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_progress_is_shown_on_a_terminal_only(tokenizer, tmp_path, monkeypatch, capsys, folder):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        data = file_of(tmp_path, flat(5))
        capsys.readouterr()
        build(data, tokenizer)
        assert ("preparing problems" in capsys.readouterr().err) == is_terminal
        assert not datasets.are_progress_bars_disabled()
        shutil.rmtree(folder)
