"""Prepared rows kept on disk, where all processes of a machine find them.

<HF_DATASETS_CACHE>/prefix-rft/<key>/
    rows*.arrow     prepared rows, written by `datasets`, a file for each process that made them
    prepared.json   the files with their sizes and times, findings, and the rows that are problems
<key>.lock          held by the process that prepares; the others wait for it

A folder is written under a temporary name and renamed. One whose files have changed since is made
again.
"""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import multiprocess
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher

from prefix_rft.data.columns import DataError
from prefix_rft.data.load_report import Finding
from prefix_rft.data.prepare import Recipe
from prefix_rft.data.prepared import prepare_table
from prefix_rft.reward import grader_info

Settle = Callable[[datasets.Dataset], tuple[np.ndarray, tuple[Finding, ...]]]

_RECIPE = 1  # part of every key: raise it when other problems follow from the same rows
_LIBRARIES = ("tokenizers", "transformers", "jinja2")  # whose versions may make a difference
_FILE = "prepared.json"
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
_locks: set[int] = set()  # file descriptors of the locks that this process holds


class Settled(NamedTuple):
    """Prepared rows whose gold answers are checked."""

    table: datasets.Dataset
    places: np.ndarray  # [n] int64, the rows that are problems
    findings: tuple[Finding, ...]


def cache_key(rows: datasets.Dataset, recipe: Recipe, *, check_answers: bool) -> str:
    """Identifies everything that decides what the rows become."""
    tokenizer = recipe.tokenizer
    if tokenizer.is_fast:
        spelled = json.loads(tokenizer.backend_tokenizer.to_str())
        spelled |= {"truncation": None, "padding": None}  # left by earlier calls, not used
    else:
        spelled = Hasher.hash(tokenizer)
    layout = recipe.layout
    made_by = {
        "recipe": _RECIPE,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "rows": rows._fingerprint,
        "layout": [layout.name, layout.needs, dict(recipe.columns)],
        "tokenizer": [type(tokenizer).__name__, spelled],
        "special_tokens": str(tokenizer.special_tokens_map),
        "splits_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "chat_template": tokenizer.chat_template,
        "system_prompt": recipe.system_prompt,
        "held_out": recipe.held_out,
        "limits": [recipe.max_prompt_tokens, recipe.max_demonstration_tokens],
        "answers": grader_info() if check_answers else None,
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:32]


def prepared_once(
    rows: datasets.Dataset, recipe: Recipe, settle: Settle, *, check_answers: bool
) -> tuple[Settled, str | None]:
    """The prepared rows of the cache, made now where it has none.

    Args:
        settle: gives the places of the problems and the findings of a prepared table.
    Returns:
        them, and a notice if the cache cannot be used: then they are in memory.
    Raises:
        DataError: the chat template refuses a prompt, or a process that prepares has died.
    """
    key = cache_key(rows, recipe, check_answers=check_answers)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "prefix-rft" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        found = _opened(folder)
        if found is None:
            with _locked(folder.with_name(f"{key}.lock")):
                found = _opened(folder)  # another process may have prepared meanwhile
                if found is None:
                    _build(folder, rows, recipe, settle)
                    found = _opened(folder)
        if found is not None:
            return found, None
        reason = f"{folder} does not keep what is written"
    except OSError as error:
        reason = str(error)
    table = _mapped(rows, recipe, key, None)
    notice = f"prepared in memory, again at every start; the cache cannot be used: {reason}"
    return Settled(table, *settle(table)), notice


def _opened(folder: Path) -> Settled | None:
    """What a folder holds; None if that is nothing, or not what was written."""
    try:
        kept = json.loads((folder / _FILE).read_text())
        for name, written in kept["files"].items():
            status = (folder / name).stat()
            if [status.st_size, status.st_mtime_ns] != written:
                return None
        tables = [datasets.Dataset.from_file(str(folder / name)) for name in kept["files"]]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, pa.ArrowException):
        return None
    table = datasets.concatenate_datasets(tables)
    places = np.array(kept["places"], dtype=np.int64)
    return Settled(table, places, tuple(Finding(**found) for found in kept["findings"]))


def _build(folder: Path, rows: datasets.Dataset, recipe: Recipe, settle: Settle) -> None:
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        table = _mapped(rows, recipe, folder.name, str(partial / "rows.arrow"))
        places, findings = settle(table)
        files = [Path(each["filename"]) for each in table.cache_files]
        written = {}
        for file in files:
            time_ns = int(file.stat().st_mtime) * 10**9  # which every file system can keep
            os.utime(file, ns=(time_ns, time_ns))
            written[file.name] = [file.stat().st_size, time_ns]
        kept: dict[str, Any] = {"files": written, "findings": [asdict(each) for each in findings]}
        kept["places"] = places.tolist()
        (partial / _FILE).write_text(json.dumps(kept))
        shutil.rmtree(folder, ignore_errors=True)  # not what was written
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mapped(rows: datasets.Dataset, recipe: Recipe, key: str, file: str | None) -> datasets.Dataset:
    """`prepare_table` with its progress on a terminal, and errors that say what happened."""
    environment, parallelism = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    shows = not datasets.are_progress_bars_disabled()
    if shows and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return prepare_table(rows, recipe, key, file)
    except multiprocess.TimeoutError as error:
        # `datasets` does not wait for its processes when a signal ends the call.
        raise error.__context__ or error from None
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            "data.path: a process that prepares the rows was killed, as it is when memory runs out"
        ) from error
    finally:
        if shows:
            datasets.enable_progress_bars()
        # `datasets` puts a copy in its place, and keeps the tokenizer's threads off.
        os.environ = environment  # noqa: B003
        if parallelism is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Held by one process at a time, and let go when that ends, however it does."""
    _register_fork()
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _locks.add(descriptor)
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _register_fork() -> None:
    if not hasattr(_register_fork, "is_done"):
        os.register_at_fork(after_in_child=_leave_parent)
        _register_fork.is_done = True


def _leave_parent() -> None:
    """In a process that helps to prepare: without the lock and the signals of its parent.

    It must not keep the lock of a parent that was killed, and ends with it.
    """
    if not _locks:
        return
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends its processes
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
