"""Where rows come from: files, folders and the hub, all through `datasets`."""

import re
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from prefix_rft.data.columns import DataError

_FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_SUFFIXES = ", ".join(_FILE_FORMATS)


def load_rows(path: str, split: str, *, key: str = "data.path") -> datasets.Dataset:
    """The rows of a parquet, json or jsonl file, of a folder of such files, or of a hub dataset.

    Args:
        path: file, folder, or hub id, optionally with a configuration: `openai/gsm8k:main`.
        split: of a hub dataset, or of a folder with files named after it; unused for a file.
        key: the configuration key of `path`, for messages.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no such split or no rows.
    """
    local = Path(path).expanduser()
    if local.is_dir() or local.is_file():
        files = _files_of_split(local, split, key) if local.is_dir() else [local]
        formats = {_FILE_FORMATS.get(file.suffix) for file in files}
        if len(formats) != 1 or None in formats:
            names = [file.name for file in files[:10]]
            raise DataError(f"{key}: {path}: expected files of one of {_SUFFIXES}, got {names}")
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
