"""Where rows come from: files, folders and the hub, all through `datasets`."""

import codecs
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from prefix_rft.data.columns import DataError

_FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_SUFFIXES = ", ".join(_FILE_FORMATS)
_long_number = re.compile(rb"[:,\[\s]-?\d{19}")  # shorter ones fit into 64 bits


def load_rows(path: str, split: str, *, key: str = "data.path") -> datasets.Dataset:
    """The rows of a parquet, json or jsonl file, of a folder of such files, or of a hub dataset.

    Args:
        path: file, folder, or hub id, optionally with a configuration: `openai/gsm8k:main`.
        split: of a hub dataset, or of a folder with files named after it; unused for a file.
        key: the configuration key of `path`, for messages.

    Raises:
        DataError: nothing is there, it cannot be read, it has no such split or no rows, or a whole
            number in a json or jsonl file needs more than 64 bits.
    """
    local = Path(path).expanduser()
    if local.is_dir() or local.is_file():
        files = _files_of_split(local, split, key) if local.is_dir() else [local]
        formats = {_FILE_FORMATS.get(file.suffix) for file in files}
        if len(formats) != 1 or None in formats:
            names = [file.name for file in files[:10]]
            raise DataError(f"{key}: {path}: expected files of one of {_SUFFIXES}, got {names}")
        for file in files if formats == {"json"} else ():
            _check_whole_numbers(file, key)
        request = {"path": formats.pop(), "data_files": [str(file) for file in files]}
        request["split"] = "train"  # the name `datasets` gives to the rows of plain files
    elif local.suffix in _FILE_FORMATS or path.startswith((".", "/", "~")):
        raise DataError(f"{key}: {path}: no such file or folder")
    else:
        hub_id, _, configuration = path.partition(":")
        request = {"path": hub_id, "name": configuration or None, "split": split}
    try:
        rows = datasets.load_dataset(**request)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "no rows"
        raise DataError(f"{key}: {path}: cannot load: {reason}") from error
    if len(rows) == 0:
        raise DataError(f"{key}: {path}: cannot load: no rows")
    return rows


def _files_of_split(folder: Path, split: str, key: str) -> list[Path]:
    """Files named after the split, as in train-00000-of-00010.parquet, or in a folder of its name.

    `datasets` would look at the whole path and take a folder inside `/data/test` for test data.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix in _FILE_FORMATS)
    found = [
        file
        for file in files
        if split == re.split("[._-]", file.name)[0] or split in file.relative_to(folder).parts[:-1]
    ]
    if not found:
        names = [str(file.relative_to(folder)) for file in files[:10]]
        raise DataError(f"{key}: {folder}: no {_SUFFIXES} file of split {split!r}; it has {names}")
    return found


def _check_whole_numbers(file: Path, key: str) -> None:
    """Raise a DataError for a whole number that `datasets` would turn into an inexact float."""
    with file.open("rb") as lines:
        rows = (line for line in lines if not line.isspace())
        suspects = [(row, line) for row, line in enumerate(rows) if _long_number.search(line)]
    text = file.read_bytes() if suspects else b""
    try:
        if text.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
            found = list(enumerate(json.loads(text, parse_int=Decimal)))
        else:
            found = [(row, json.loads(line, parse_int=Decimal)) for row, line in suspects]
    except (json.JSONDecodeError, UnicodeDecodeError):
        return  # `datasets` says what is wrong
    for row, value in found:
        for number in _whole_numbers(value):
            if not -(2**63) <= number < 2**63:
                raise DataError(
                    f"{key}: {file}: row {row}: {number} needs more than 64 bits; write it as a "
                    "string"
                )


def _whole_numbers(value: Any) -> Iterator[Decimal]:
    if isinstance(value, Decimal):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(item)
