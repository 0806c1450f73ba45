"""Rows from files, folders and the hub, and what cannot be loaded."""

import json
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefix_rft.checks import UserError
from prefix_rft.data.columns import DataError, find_map
from prefix_rft.data.sources import load_rows


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def flat(num_rows):
    return [{"prompt": f"q{i}", "answer": str(i)} for i in range(num_rows)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json"])
def test_files_load(tmp_path, form):
    rows = datasets.Dataset.from_list(flat(3))
    path = str(tmp_path / f"rows.{form}")
    if form == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, lines=form == "jsonl")
    loaded = load_rows(path, "any split")
    assert loaded["prompt"][:] == ["q0", "q1", "q2"]


def test_folders_load_by_split(tmp_path):
    """The path of the folder itself, which contains "test", is ignored."""
    tmp_path = tmp_path / "test" / "data"
    tmp_path.mkdir(parents=True)
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", flat(3))
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", flat(4))
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "0000.jsonl", flat(2))
    (tmp_path / "README.md").write_text("train")
    assert len(load_rows(str(tmp_path), "train")) == 7
    assert len(load_rows(str(tmp_path), "test")) == 2  # not 9
    with pytest.raises(DataError, match=r"no .* file of split 'eval'; it has \['test/0000"):
        load_rows(str(tmp_path), "eval")
    (tmp_path / "train.parquet").write_text("")
    with pytest.raises(DataError, match=r"expected files of one of .*, got \['train-0"):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "cannot load: no rows"),
        ("a.json", "[]", "cannot load: .*no data|no rows"),
        ("a.jsonl", '{"prompt": ', "cannot load: .*JSON parse error"),
        ("a.parquet", "nonsense", "cannot load: .*Parquet"),
        ("a.txt", "1", r"expected files of one of .parquet, .json, .jsonl, got \['a.txt'\]"),
        (None, "", "no such file or folder"),
    ],
)
def test_files_that_cannot_be_loaded(tmp_path, name, content, message):
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(path), "train")
    assert str(caught.value).startswith(f"data.path: {path}: ")
    assert isinstance(caught.value, UserError)
    with pytest.raises(DataError) as caught:
        load_rows(str(path), "train", key="data.eval_path")
    assert str(caught.value).startswith(f"data.eval_path: {path}: ")


@pytest.mark.parametrize("form", ["jsonl", "json", "indented json"])
@pytest.mark.parametrize("number", [2**70, 2**63, -(2**63) - 1])
def test_a_whole_number_beyond_64_bits_is_refused_with_its_row(tmp_path, form, number):
    rows = [{"meta": {"gold": n}} for n in (2**63 - 1, -(2**63), number)]
    path = tmp_path / f"a.{form.split()[-1]}"
    for count in (2, 3):
        if form == "jsonl":
            write_jsonl(path, rows[:count])
        else:
            path.write_text(json.dumps(rows[:count], indent=2 if "indented" in form else None))
        if count == 2:
            assert [row["meta"]["gold"] for row in load_rows(str(path), "")] == [
                2**63 - 1,
                -(2**63),
            ]
    with pytest.raises(DataError, match=f"data.path: .*: row 2: {number} needs more than 64"):
        load_rows(str(path), "")


def test_long_digits_in_a_string_are_as_exact_as_they_stand(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"answer": f" {2**70}"}, {"answer": f"x: {2**70}"}])
    assert load_rows(str(path), "")["answer"][:] == [f" {2**70}", f"x: {2**70}"]


def test_decimals_of_a_parquet_file_are_exact(tmp_path):
    path = str(tmp_path / "a.parquet")
    column = pa.array([Decimal(2**70), Decimal("7")], pa.decimal128(38, 0))
    pq.write_table(pa.table({"problem": ["a", "b"], "answer": column}), path)
    rows = load_rows(path, "")
    read = find_map(rows, {}, key="data.columns").read
    assert [read(row).answer for row in rows] == [str(2**70), "7"]


def test_an_empty_parquet_file_and_an_empty_folder(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(str(path))
    with pytest.raises(DataError, match="no rows|no data"):
        load_rows(str(path), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match="data.path: .*: no .* file of split 'train'; it has \\[\\]"
    ):
        load_rows(str(tmp_path / "empty"), "train")


def test_hub_ids_may_name_a_configuration(monkeypatch):
    requests = []

    def load_dataset(**request):
        requests.append(request)
        return datasets.Dataset.from_list(flat(1))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_rows("openai/gsm8k:main", "test")
    load_rows("open-r1/OpenR1-Math-220k", "train")
    assert requests == [
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
        {"path": "open-r1/OpenR1-Math-220k", "name": None, "split": "train"},
    ]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(**request):
        raise ConnectionError("the hub is offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="data.path: a/b: cannot load: the hub is offline"):
        load_rows("a/b", "train")
