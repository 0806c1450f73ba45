"""Launch parameters of the row kernels, timed; prints the table that `rows/launch.py` commits.

    python -m bench.autotune [--smoke] [--out FILE.csv] [--budget-s 300]

Every candidate runs forward and backward at every width of a class of rows; the least sum of its
times, each over the best of that width, wins. A candidate that the device cannot hold is left out.
Run it on the machine the table is for, and check the tests before committing its lines.
"""

import itertools
import os
from collections import defaultdict
from functools import partial

import torch

from bench.harness import require_triton

if __name__ == "__main__":
    require_triton("bench.autotune")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # a smoke run; before triton is imported

from bench.device import Bench

NARROW = 4096
WIDTHS = {NARROW: (1024, 4096), None: (32000, 151936, 262144)}  # None: wider than any other
DTYPES = {2: torch.bfloat16, 4: torch.float32}
LOGITS_BYTES = 2**31  # of a timed matrix: many times the L2
LANES_BYTES = (1024, 2048, 4096)
DEPTHS = (1, 2, 4, 8)
WARPS = (4, 8, 16)
STAGES = (1, 2, 3)


def candidates(*, itemsize: int, smoke: bool) -> list[tuple[int, int, int, int]]:
    """(lanes, depth, num_warps, num_stages): 8 to 64 logits a thread."""
    if smoke:
        return [(16, 2, 1, 1), (32, 1, 1, 2)]
    grid = itertools.product((size // itemsize for size in LANES_BYTES), DEPTHS, WARPS, STAGES)
    return [x for x in grid if 8 <= x[0] * x[1] // (32 * x[2]) <= 64]


def main() -> None:
    bench = Bench(
        __doc__,
        tests=["tests/kernels/test_token_stats_triton.py"],
        smoke_test="tests/kernels/test_token_stats_triton.py::test_entropy_has_no_sign",
    )
    from rft_kernels import token_stats
    from rft_kernels.rows import triton_backend
    from rft_kernels.rows.launch import RowLaunch
    from triton.runtime.errors import OutOfResources

    def run(launch: RowLaunch, logits: torch.Tensor, targets: torch.Tensor) -> None:
        triton_backend.row_launch = lambda logits: launch
        found = token_stats(logits, targets, backend="triton")
        torch.autograd.grad(found.log_probs.sum() + found.entropy.sum(), logits)

    widths = {64: (40, 64)} if bench.smoke else WIDTHS
    classes = [(size, bound) for size in DTYPES for bound in widths]
    best: dict[int, list[tuple[int | None, RowLaunch]]] = defaultdict(list)
    committed = triton_backend.row_launch
    for itemsize, bound in bench.shapes(classes):
        times: dict[RowLaunch, dict[int, float]] = defaultdict(dict)
        for width in widths[bound]:
            num_rows = 4 if bench.smoke else LOGITS_BYTES // (width * itemsize)
            shape = (num_rows, width)
            logits = torch.empty(shape, dtype=DTYPES[itemsize], device=bench.device)
            logits.normal_().requires_grad_()
            targets = torch.randint(width, shape[:1], device=bench.device)
            calls = {}
            for values in candidates(itemsize=itemsize, smoke=bench.smoke):
                call = partial(run, RowLaunch(*values), logits, targets)
                try:
                    call()
                except OutOfResources:
                    continue
                calls[str(values)] = call
            first = len(bench.rows)
            facts = {"T": num_rows, "V": width, "dtype": str(logits.dtype).removeprefix("torch.")}
            bench.add(facts, calls, floor_bytes=3 * logits.nbytes, share=1 / len(widths[bound]))
            found = bench.rows[first:]
            least = min(row["median_ms"] for row in found)
            for row in found:
                launch = RowLaunch(*map(int, row["variant"].strip("()").split(", ")))
                times[launch][width] = row["median_ms"] / least
        complete = {k: v for k, v in times.items() if len(v) == len(widths[bound])}
        best[itemsize].append((bound, min(complete, key=lambda k: sum(complete[k].values()))))
    triton_backend.row_launch = committed
    bench.finish()
    for itemsize, entries in best.items():
        line = ", ".join(
            f"({bound or '_WIDEST'}, RowLaunch({', '.join(map(str, launch))}))"
            for bound, launch in entries
        )
        print(f"    {itemsize}: ({line},),")


if __name__ == "__main__":
    main()
