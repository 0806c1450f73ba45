"""What the benchmarks of the ops share: cold-cache times, the floor, errors, rivals, the gate.

On CUDA a call is timed by events, after the L2 cache was overwritten, in turns with its rivals; on
a CPU (smoke runs) by the clock.
"""

import argparse
import importlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.green import require_green
from bench.harness import (
    MIB,
    interleaved_ms,
    machine,
    peak_above_mib,
    require_triton,
    spread,
    write_csv,
    write_rows,
)

try:
    from triton.errors import TritonError
except ModuleNotFoundError:  # nothing raises it then; on a CPU most benchmarks can do without
    TritonError = RuntimeError

# The shapes that matter most come first: a budget that runs out leaves out the others.
SHAPES = [(8192, 151936), (2048, 151936), (32768, 151936), (8192, 128256), (8192, 32000)]
SHAPES += [(8192, 262144), (2048, 32000), (2048, 128256), (2048, 262144)]
SHAPES += [(32768, 32000), (32768, 128256), (32768, 262144)]
CASES = [(*shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in SHAPES]
SMOKE_CASES = [(16, 503, torch.bfloat16), (16, 503, torch.float32)]
ACTIVE_SHARES = (1.0, 0.5, 0.25, 0.1)

# Of what is measured beside torch.
VERSIONED = ("triton", "transformers", "trl", "liger-kernel", "nvidia-cutlass-dsl", "flash-attn")
VERSIONED += ("cut-cross-entropy", "verl")

_FLUSH_BYTES = 2**28  # several times any L2
_REPEATS = (5, 60)  # fewest and most rounds of a measurement
_COMPILING = 1 / 3  # of the time for all shapes, at most

Calls = dict[str, Callable[[], Any]]


class Bench:
    """One run of a benchmark: its options, its clock, its rows."""

    def __init__(self, description: str, *, tests: list[str], smoke_test: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--smoke", action="store_true", help="tiny shapes, one repeat")
        parser.add_argument("--out", type=Path, help="CSV file")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--budget-s", type=float, default=180, help="time for all shapes")
        parser.add_argument(
            "--tests-green", action="store_true", help="the caller has just run them"
        )
        options = parser.parse_args()
        torch.set_num_threads(options.threads)
        self.smoke, self.out = options.smoke, options.out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":  # without it, torch would be timed as ours
            require_triton("a benchmark on CUDA")
        if not options.tests_green:
            require_green([smoke_test] if self.smoke else tests)
        self._end = time.monotonic() + options.budget_s
        self._compile_budget_s = _COMPILING * options.budget_s
        self._compiled_s: list[float] = []  # time of each compilation
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        # By which a rival fails on a device, shape or version that it was not made for.
        self.failures: tuple[type[Exception], ...] = (
            RuntimeError, ValueError, AssertionError, TypeError, AttributeError, ImportError,
            TritonError,
        )  # fmt: skip
        self._facts = machine() | {"versions": versions()}
        self.copy_gb_s = copy_gb_s(self.device, smoke=self.smoke)

    def shapes(self, shapes: Iterable[Any]) -> Iterable[Any]:
        """The shapes in order, as long as there is time; the others are named in the output."""
        shapes = list(shapes)
        for i, shape in enumerate(shapes):
            left = self._end - time.monotonic()
            if left <= 0:
                self.skipped += [f"{other}: out of time" for other in shapes[i:]]
                return
            self.slice_s = left / (len(shapes) - i)
            yield shape
            if self.out is not None and self.rows:
                write_csv(self.rows, self.out)  # so that a run cut short leaves what it has

    def fits(self, num_bytes: int, name: str) -> bool:
        """Whether the device holds so much; says so if not."""
        if self.device.type == "cpu" or num_bytes < 0.9 * torch.cuda.mem_get_info()[1]:
            return True
        self.skipped.append(f"{name}: needs {num_bytes / 2**30:.0f} GiB")
        return False

    def logits(
        self, num_tokens: int, vocab_size: int, dtype: torch.dtype
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Logits [T, V] of a normal distribution, or None where they do not fit; their facts."""
        facts = {"T": num_tokens, "V": vocab_size, "dtype": str(dtype).removeprefix("torch.")}
        if not self.fits(3 * num_tokens * vocab_size * dtype.itemsize, _text(facts)):
            return None, facts
        torch.manual_seed(0)
        logits = torch.empty(num_tokens, vocab_size, dtype=dtype, device=self.device)
        return logits.normal_(std=3).requires_grad_(), facts

    def compiled(
        self, function: Callable, first_calls: Callable[[Callable], Any], facts: dict[str, Any]
    ) -> dict[str, Callable]:
        """The function compiled, by name, after `first_calls` of it; nothing in a smoke run.

        Compilations take seconds. Where the time for them has no room for one more as long as the
        longest yet, it is left out, and named in the output.
        """
        if self.smoke:
            return {}
        name = f"torch.compile, {_text(facts)}"
        next_s = max(self._compiled_s, default=0)
        if sum(self._compiled_s) + next_s > self._compile_budget_s:
            self.skipped.append(f"{name}: out of time for compiling")
            return {}
        torch._dynamo.reset()  # else it stops compiling after a few shapes
        found = torch.compile(function, dynamic=False)
        start = time.monotonic()
        done = self.attempt(name, lambda: (first_calls(found), True))
        self._compiled_s.append(time.monotonic() - start)
        return {"torch.compile": found} if done else {}

    def add(
        self,
        facts: dict[str, Any],
        calls: Calls,
        *,
        share: float,
        floor_bytes: Any = None,
        floor_of: Callable[[str], str] | None = None,
        result_bytes: Any = 0,
        columns: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Times the calls in turns, for `share` of this shape's time; one row each.

        `floor_bytes`: what must be moved; or `floor_of`, the variant that is the floor of another;
        `result_bytes`: of what a call is to return, which is not counted in its peak;
        `columns`: what else is known of each variant.
        The bytes are a number or a function of the variant's name.
        """
        shape = _text(facts)
        calls = {
            name: call
            for name, call in calls.items()
            if self.attempt(f"{name}, {shape}", lambda call=call: (call(), True))
        }
        if not calls:
            return
        peaks = {name: peak_mib(call, self.device) for name, call in calls.items()}
        times = self._times(calls, self.slice_s * share)
        for name, elapsed in times.items():
            figures = spread(elapsed)
            if floor_of is None:
                floor_ms = _of(floor_bytes, name) / self.copy_gb_s / 1e6
            else:
                floor_ms = spread(times.get(floor_of(name), [math.nan]))["median_ms"]
            peak = peaks[name] - _of(result_bytes, name) / MIB
            self.rows.append(
                {"variant": name, **facts, **figures}
                | {"floor_ms": floor_ms, "of_floor": floor_ms / figures["median_ms"]}
                | {"peak_mib": peak, "copy_gb_s": self.copy_gb_s}
                | self._facts
                | (columns or {}).get(name, {})
            )

    def finish(self) -> None:
        write_rows(self.rows, self.out)
        for line in self.skipped:
            print("left out:", line)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result, or None where memory, or a rival, fails it; that is then printed."""
        try:
            return call()
        except self.failures as error:
            if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
                raise
            lines = str(error).splitlines() or [""]
            self.skipped.append(f"{name}: {type(error).__name__}: {lines[0][:120]}")
        torch.cuda.empty_cache()
        return None

    def _times(self, calls: Calls, seconds: float) -> dict[str, list[float]]:
        if self.device.type == "cpu":
            return interleaved_ms(calls, 1 if self.smoke else _REPEATS[0])
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)
        start = time.monotonic()
        _event_round(calls, flush)
        fewest, most = _REPEATS
        repeats = int(min(most, max(fewest, seconds / max(time.monotonic() - start, 1e-4))))
        rounds = [_event_round(calls, flush) for _ in range(1 if self.smoke else repeats)]
        return {name: [one[name] for one in rounds] for name in calls}


def run(
    description: str,
    measure: Callable[..., None],
    *,
    cases: list[tuple],
    smoke_cases: list[tuple],
    tests: list[str],
    smoke_test: str,
) -> None:
    """The whole of a benchmark: its tests, `measure(bench, *case)` for each case, its rows."""
    bench = Bench(description, tests=tests, smoke_test=smoke_test)
    for case in bench.shapes(smoke_cases if bench.smoke else cases):
        measure(bench, *case)
    bench.finish()


def _of(number: Any, name: str) -> float:
    return number(name) if callable(number) else number


def _text(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in facts.items())


def _event_round(calls: Calls, flush: Tensor) -> dict[str, float]:
    """Each call once, the cache cold, in ms."""
    events = {}
    for name, call in calls.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def copy_gb_s(device: torch.device, *, smoke: bool) -> float:
    """Bytes read and written a second by a large copy on the device, in GB/s: the floor's speed."""
    size = 2**24 if smoke or device.type == "cpu" else 2**31
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    if device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        times = [_event_round(call, flush)["copy"] for _ in range(12)][2:]
    else:
        times = interleaved_ms(call, 3)["copy"]
    return 2 * source.nbytes / spread(times)["median_ms"] / 1e6


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Most memory allocated during the call above what was before it, MiB; on a CPU resident."""
    if device.type == "cpu":
        return peak_above_mib(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def errors(found: Tensor, truth: Tensor, name: str) -> dict[str, float]:
    """Largest and mean absolute error, columns `max_err_<name>` and `mean_err_<name>`."""
    error = (found.double() - truth).abs()
    return {f"max_err_{name}": error.max().item(), f"mean_err_{name}": error.mean().item()}


def optional(module: str, name: str) -> Any:
    """A rival's function, or None where it is not installed, or not with what it needs."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, AttributeError) as error:
        print(f"no {module}: {error}")
        return None


def versions() -> str:
    """Of `VERSIONED`, as installed."""
    found = []
    for name in VERSIONED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)
