"""The longest response that fits into so much GPU memory, with the eager head and with ours.

    python -m bench.memory_table [--smoke] [--out FILE.csv] [--budget-s 300]

One update step (`bench.update_step`) of one rollout, its prompt of 256 tokens, in a fresh process
that may allocate so much (`torch.cuda.set_per_process_memory_fraction`) and no more; out of memory
is the answer no. Weights are of random numbers in the shapes of Qwen2.5: all of them trained
(float32, AdamW), or adapters of rank 32 over a frozen bfloat16 body. What CUDA itself keeps beside
the allocator is not in the limit. A length is found to within a sixteenth, rounded down.

Writes a CSV, and beside it a table in Markdown.
"""

import argparse
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import MIB, in_fresh_process, machine, write_csv, write_rows

HEADS = ("ours", "eager head")
# Size and adapters' rank (None: all weights are trained), those that fit small memories first.
MODELS = (("0.5B", None), ("1.5B", 32), ("7B", 32), ("1.5B", None))
LIMITS_GIB = (16, 24, 40, 80)
UNIT = 256  # tokens
MOST = 65536  # tokens, that a trial may take; a result as long is a lower bound

_PRECISION = 1 / 16
_MARGIN = 0.98  # of the limit, where a prediction aims
_CUDA_GIB = 1  # that a process takes beside its limit

Trial = Callable[[int], float | None]  # length -> peak, or None: it does not fit
Peaks = list[tuple[int, float]]  # lengths that fitted, their peaks


def longest(
    peak_of: Trial, *, limit: float, known: Peaks, unit: int = UNIT, most: int = MOST
) -> int:
    """The largest multiple of `unit` up to `most` that fits, 0 if none, by trials.

    To within `unit` or a sixteenth. Peaks grow about linearly, so a trial is where the line through
    the last two that fitted meets the limit, or halfway where that is known not to fit.

    Args:
        peak_of: a trial; what fits at one length fits at all shorter ones.
        limit: of the peaks.
        known: peaks under smaller limits; those found here are added.
    """
    known.sort()
    low, high = (known[-1][0] if known else 0), math.inf
    while low < most and high - low > max(unit, _PRECISION * low):
        length = _predicted(known, limit, unit)
        if length > high - max(unit, _PRECISION * low):
            length = (low + int(high)) // 2
        length = max(length, int(low * (1 + _PRECISION))) // unit * unit
        length = int(min(max(length, low + unit), high - unit, most))
        peak = peak_of(length)
        if peak is None:
            high = length
        else:
            low = length
            known.append((length, peak))
    return low


def _predicted(known: Peaks, limit: float, unit: int) -> int:
    """One unit, then eight, then where the line through the last two meets the limit."""
    if len(known) < 2:
        return 8 * unit if known else unit
    (a, peak_a), (b, peak_b) = known[-2:]
    slope = max((peak_b - peak_a) / (b - a), 1e-6)
    return int(min(b + (_MARGIN * limit - peak_b) / slope, 2**31))


def trial(job: dict[str, Any]) -> float | None:
    """The peak of one step in this process, MiB (0 on a CPU); None: out of memory."""
    from bench.update_step import EAGER, NUM_PROMPT, adamw, make_batch, make_policy, ours, update

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    if on_cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(job["limit_gib"] * 2**30 / total)
    loss = ours if job["head"] == "ours" else EAGER
    try:
        policy = make_policy(job["size"], device, lora_rank=job["lora_rank"])
        optimizer = adamw(policy)
        for num_response in (2, job["length"]):  # the optimizer's state comes before the peak
            batch = make_batch(policy, num_rows=1, num_prompt=NUM_PROMPT, num_response=num_response)
            update(policy, optimizer, batch, loss)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() / MIB if on_cuda else 0.0


class OutOfTimeError(Exception):
    """The budget is spent; what is not known by then is left out."""


class Room:
    """The device's memory, shared by processes that run side by side."""

    def __init__(self, gib: float) -> None:
        self._free, self._changed = gib, threading.Condition()

    @contextmanager
    def take(self, gib: float) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= gib)
            self._free -= gib
        try:
            yield
        finally:
            with self._changed:
                self._free += gib
                self._changed.notify_all()


def cells(
    size: str, lora_rank: int | None, head: str, limits: list[float], room: Room, end: float
) -> list[dict[str, Any]]:
    """A row for each limit, ascending; those for which the time did not suffice are left out."""
    rows, known = [], []
    num_trials = 0
    job = {"size": size, "lora_rank": lora_rank, "head": head}

    def peak_of(length: int, limit: float) -> float | None:
        nonlocal num_trials
        with room.take(limit + _CUDA_GIB):
            if time.monotonic() > end:
                raise OutOfTimeError
            num_trials += 1
            arguments = ["--trial", json.dumps(job | {"length": length, "limit_gib": limit})]
            return in_fresh_process("bench.memory_table", arguments)

    for limit in limits:
        num_trials = 0
        try:
            length = longest(partial(peak_of, limit=limit), limit=limit * 1024, known=known)
        except OutOfTimeError:
            print(f"left out: {size}, {_training(lora_rank)}, {head}, {limit:g} GiB: out of time")
            continue
        rows.append(
            {
                "variant": head, "model": size, "training": _training(lora_rank),
                "limit_gib": limit, "longest_tokens": length,
                "peak_mib": dict(known).get(length, float("nan")), "trials": num_trials,
            }
        )  # fmt: skip
    return rows


def _training(lora_rank: int | None) -> str:
    return "all weights" if lora_rank is None else f"LoRA of rank {lora_rank}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Eager -> ours, one line a model, one column a limit."""
    limits = sorted({row["limit_gib"] for row in rows})
    found = {
        (row["model"], row["training"], row["limit_gib"], row["variant"]): row["longest_tokens"]
        for row in rows
    }
    lines = [
        "| model | trained | " + " | ".join(f"{limit:g} GiB" for limit in limits) + " |",
        "|---|---|" + "---|" * len(limits),
    ]
    for model, training in dict.fromkeys(key[:2] for key in found):
        texts = []
        for limit in limits:
            pair = [found.get((model, training, limit, head)) for head in reversed(HEADS)]
            texts.append(" → ".join(map(_text, pair)))
        lines.append(f"| {model} | {training} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _text(length: int | None) -> str:
    if length is None:
        return "?"
    return f"{length:,}" + ("+" if length >= MOST else "") if length else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one trial of a tiny model per head")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--budget-s", type=float, default=300, help="after it no trial begins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trial", help="run this one, as JSON, and print its peak")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.trial:
        print(json.dumps(trial(json.loads(options.trial))))
        return
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("no CUDA device, and no limit of memory to set: only --smoke runs here")
    end = time.monotonic() + options.budget_s
    rows = smoke() if options.smoke else search(options.out, end)
    rows = [row | machine() for row in rows]
    write_rows(rows, options.out)
    print(markdown(rows))
    if options.out is not None:
        options.out.with_suffix(".md").write_text(markdown(rows))


def smoke() -> list[dict[str, Any]]:
    """One trial of a tiny model per head."""
    facts = {"model": "tiny", "training": _training(None), "limit_gib": 1, "longest_tokens": 8}
    job = {"size": "tiny", "lora_rank": None, "length": 8, "limit_gib": 1}

    def row(head: str) -> dict[str, Any]:
        arguments = ["--trial", json.dumps(job | {"head": head}), "--threads", "1"]
        peak = in_fresh_process("bench.memory_table", arguments)
        return {"variant": head, **facts, "peak_mib": peak, "trials": 1}

    with ThreadPoolExecutor(len(HEADS)) as pool:
        return list(pool.map(row, HEADS))


def search(out: Path | None, end: float) -> list[dict[str, Any]]:
    """All models, heads and limits, side by side as far as the device's memory goes."""
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    limits = [limit for limit in LIMITS_GIB if limit + _CUDA_GIB < total_gib]
    room = Room(total_gib - _CUDA_GIB)
    rows: list[dict[str, Any]] = []
    jobs = [(*model, head) for model in MODELS for head in HEADS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for found in pool.map(lambda job: cells(*job, limits, room, end), jobs):
            rows += found
            if out is not None and rows:
                write_csv([row | machine() for row in rows], out)
    return rows


if __name__ == "__main__":
    main()
