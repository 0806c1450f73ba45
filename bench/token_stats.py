"""`token_stats` from logits: forward, backward and both, against its rivals and the floor.

    python -m bench.token_stats [--smoke] [--out FILE.csv] [--budget-s 180]

The floor is the bytes that must move at the speed of a copy measured in the same run: forward T V,
backward (1 + a) T V (a the share of rows with a gradient; every row of the gradient is written).
Rivals do not look at which rows have one. torch.compile has no row for the backward alone: what it
saves is gone after one. Errors are against float64, over the first rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import rft_kernels
import torch
from torch import Tensor

from bench.device import ACTIVE_SHARES, CASES, SMOKE_CASES, Bench, Calls, errors, optional, run

ERROR_ROWS = 64

Op = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # logits, targets -> log_probs (, entropy)


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    return log_probs, -(log_p.exp() * log_p).sum(-1)


def rivals(bench: Bench, facts: dict, compile_for: Callable[[Op], Any]) -> dict[str, Op]:
    """Every rival installed; those that are Triton kernels need CUDA."""
    found: dict[str, Op] = {"eager": eager} | bench.compiled(eager, compile_for, facts)
    if bench.device.type != "cuda":
        return found
    trl = optional("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    liger = optional("liger_kernel.transformers.functional", "liger_cross_entropy")
    flash = optional("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    if trl is not None:
        found["TRL"] = trl
    if liger is not None:  # its forward writes the gradient over its input
        found["Liger CE (no entropy)"] = lambda x, y: (-liger(x, y, reduction="none"),)
    if flash is not None:
        found["flash-attn CE (no entropy)"] = lambda x, y: (-flash(x, y)[0],)
    return found


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return rft_kernels.token_stats(logits, targets)


def error_columns(op: Op, logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Errors of both statistics and of the gradient, on the first rows."""
    targets = targets[:ERROR_ROWS]
    leaf = logits.detach()[:ERROR_ROWS].double().requires_grad_()
    log_p = torch.log_softmax(leaf, -1)
    truth = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    found_in = logits.detach()[:ERROR_ROWS].clone().requires_grad_()
    found = op(found_in, targets)
    columns = {}
    for name, i in (("log_probs", 0), ("entropy", 1)):
        here = found[i] if i < len(found) else torch.full_like(truth[0], torch.nan)
        columns |= errors(here.detach(), truth[i].detach(), name)
    (expected,) = torch.autograd.grad(sum(x.sum() for x in truth[: len(found)]), leaf)
    (dlogits,) = torch.autograd.grad(sum(x.sum() for x in found), found_in)
    return columns | errors(dlogits, expected, "dlogits")


def backward(
    outputs: tuple[Tensor, ...], logits: Tensor, rows: Tensor, *, keep: bool = False
) -> None:
    """The gradient of the sum of the outputs of `rows`."""
    gradients = [rows.to(x.dtype) for x in outputs]
    torch.autograd.grad(outputs, logits, gradients, retain_graph=keep)


def forward(op: Op, logits: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        op(logits, targets)


def both(op: Op, logits: Tensor, targets: Tensor, rows: Tensor) -> None:
    backward(op(logits, targets), logits, rows)


def measure(bench: Bench, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits, facts = bench.logits(num_tokens, vocab_size, dtype)
    if logits is None:
        return
    targets = torch.randint(vocab_size, (num_tokens,), device=bench.device)
    every = torch.ones(num_tokens, dtype=torch.bool, device=bench.device)

    def compile_for(op: Op) -> None:
        error_columns(op, logits, targets)
        forward(op, logits, targets)
        both(op, logits, targets, every)

    ops = {"ours": ours} | rivals(bench, facts, compile_for)
    wrong = {
        name: bench.attempt(name, partial(error_columns, op, logits, targets))
        for name, op in ops.items()
    }
    ops = {name: op for name, op in ops.items() if wrong[name]}
    place = torch.rand(num_tokens, device=bench.device).argsort().argsort() / num_tokens
    for share in ACTIVE_SHARES:
        calls: dict[str, Calls] = {"forward": {}, "backward": {}, "both": {}}
        rows = place < share
        for name, op in ops.items():
            if name != "ours" and share != 1:
                continue  # the same work whatever the share
            x = logits
            if name.startswith("Liger"):
                x = logits.detach().clone().requires_grad_()
            if share == 1:
                calls["forward"][name] = partial(forward, op, x, targets)
            calls["both"][name] = partial(both, op, x, targets, rows)
            calls["backward"][name] = _backward_of(op, x, targets, rows)
        for which, variants in calls.items():
            factor = {"forward": 1, "backward": 1 + share, "both": 2 + share}[which]
            bench.add(
                facts | {"pass": which, "active": share},
                variants,
                floor_bytes=factor * logits.nbytes,
                share=0.15,
                columns=wrong,
            )


def _backward_of(op: Op, logits: Tensor, targets: Tensor, rows: Tensor) -> Callable[[], None]:
    """The backward alone, again and again on one graph made at the first call."""
    kept: list[tuple[Tensor, ...]] = []

    def call() -> None:
        if not kept:
            kept.append(op(logits, targets))
        try:
            backward(kept[0], logits, rows, keep=True)
        except torch.OutOfMemoryError:
            kept.clear()  # its graph would leave the others no room
            raise

    return call


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        cases=CASES,
        smoke_cases=SMOKE_CASES,
        tests=["tests/kernels/test_token_stats.py", "tests/kernels/test_token_stats_triton.py"],
        smoke_test="tests/kernels/test_token_stats.py::test_shapes",
    )
