"""Time and memory to load a dataset of the paper's size, at the first start and at later ones.

    python -m bench.data_loading [--smoke] [--out FILE.csv] [--rows N] [--tokenizer FOLDER]

The rows are made: the layout of OpenR1-46k, a demonstration of 15 KB of words that are mostly
different, a gold answer that is a number. Each start is a process of its own; memory is what it
holds itself (RssAnon), above what it had after its imports: the page cache is everybody's. Parsing
the gold answers is part of a first start and timed apart too. The bare tokenizer gets the same
texts, prompt and demonstration together, on all cores.

`wall_s` depends on what else the machine does; `cpu_s` is of the process and those that it started.
"""

import argparse
import json
import os
import random
import resource
import string
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets

from bench.harness import in_fresh_process, machine, write_rows

_WORDS = 20_000
_DEMONSTRATION_CHARS = 15_000
_COLUMNS = (
    "wall_s", "cpu_s", "golds_s", "digest_ms", "own_mib", "own_mib_batch", "tokens_per_row"
)  # fmt: skip
_BATCH = 256  # texts that the bare tokenizer gets at a time


def make_rows(file: Path, num_rows: int, num_chars: int) -> None:
    """A parquet file in the layout of OpenR1-46k."""
    rng = random.Random(0)
    letters = string.ascii_lowercase
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(_WORDS)]

    def rows() -> Any:
        for index in range(num_rows):
            text = " ".join(rng.choices(words, k=num_chars // 5))[:num_chars]
            yield {
                "data_source": "made",
                "prompt": [{"role": "user", "content": f"What is {index} + 1? {text[:200]}"}],
                "target": [{"role": "assistant", "content": f"<think>\n{text}\n</think>\n{index}"}],
                "ability": "math",
                "reward_model": {"ground_truth": str(index + 1), "style": "rule"},
                "extra_info": {"index": index, "split": "train"},
            }

    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = datasets.Dataset.from_generator(rows, cache_dir=folder)
        made.to_parquet(file)


def make_tokenizer(folder: Path, file: Path) -> None:
    """A byte-level BPE of some thousand tokens, learnt from the rows: no download."""
    from prefix_rft.data.base_model import train_tokenizer

    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    texts = [row["target"][0]["content"] for row in rows.select(range(min(len(rows), 200)))]
    train_tokenizer(texts, 4096).save_pretrained(folder)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _own_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def load(file: Path, tokenizer_folder: str) -> dict[str, float]:
    """What a start does with the data: load it, take the digest, read a batch."""
    from transformers import AutoTokenizer

    from prefix_rft.config import config_from_dict
    from prefix_rft.data import load_problems, problems

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = {"path": str(file), "num_eval": 1}
    config = config_from_dict({"data": data, "rollout": {"max_response_length": 16384}})
    golds, unparseable = [0.0], problems._unparseable

    def timed(answers: list[str]) -> set[str]:
        begun = time.perf_counter()
        found = unparseable(answers)
        golds.append(time.perf_counter() - begun)
        return found

    problems._unparseable = timed
    memory, cpu, start = _own_mib(), _cpu_s(), time.perf_counter()
    train, _, [report] = load_problems(config, tokenizer)
    wall = time.perf_counter() - start
    loaded = _own_mib() - memory
    before = time.perf_counter()
    train.fingerprint()
    digest = time.perf_counter() - before
    batch = list(train[:256])
    assert report.notice is None and report.num_demonstrations == report.num_rows
    return {
        "wall_s": wall,
        "cpu_s": _cpu_s() - cpu,
        "golds_s": sum(golds),
        "digest_ms": digest * 1e3,
        "own_mib": loaded,
        "own_mib_batch": _own_mib() - memory,
        "tokens_per_row": sum(len(each.demonstration_ids) for each in batch) / len(batch),
    }


def bare(file: Path, tokenizer_folder: str) -> dict[str, float]:
    """The tokenizer alone: its library's threads on all cores, texts in memory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    texts = [row["prompt"][0]["content"] + row["target"][0]["content"] for row in rows]
    cpu, start = _cpu_s(), time.perf_counter()
    for begin in range(0, len(texts), _BATCH):
        tokenizer.backend_tokenizer.encode_batch(texts[begin : begin + _BATCH])
    return {"wall_s": time.perf_counter() - start, "cpu_s": _cpu_s() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few short rows")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--rows", type=int, default=46_000)
    parser.add_argument("--tokenizer", help="folder; default: one that is learnt from the rows")
    parser.add_argument("--skip-bare", action="store_true", help="only the starts")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # of a fresh process
    options = parser.parse_args()
    if options.part:
        name, file, tokenizer_folder = options.part
        part = bare if name == "bare" else load
        print(json.dumps(part(Path(file), tokenizer_folder)))
        return
    num_rows, num_chars = (400, 12_000) if options.smoke else (options.rows, _DEMONSTRATION_CHARS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        file = folder / "rows.parquet"
        make_rows(file, num_rows, num_chars)
        tokenizer = options.tokenizer or str(folder / "tokenizer")
        if options.tokenizer is None:
            make_tokenizer(folder / "tokenizer", file)
        parts = ["bare"] * (not options.skip_bare) + ["first start", "second start"]
        for part in parts:
            arguments = ["--part", part, str(file), tokenizer]
            figures = in_fresh_process("bench.data_loading", arguments)
            print(part, figures, file=sys.stderr)
            row = {"variant": part, "rows": num_rows, "chars": num_chars}
            for column in _COLUMNS:
                row[column] = figures.get(column, "")
            rows.append(row | machine())
    write_rows(rows, options.out)


if __name__ == "__main__":
    main()
