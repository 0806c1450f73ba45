"""`linear_prefix_rft_loss` on a GPU: loss and gradients, against its rivals and the bare GEMMs.

    python -m bench.linear_rivals [--smoke] [--out FILE.csv] [--budget-s 180]

Every variant returns the same clipped loss and its gradients by hidden states and lm_head weight.
A rival that ends in log-probs is completed by one eager line; what it does not compute of what ours
does is named in the column `lacks`. Of T rows the share a has an advantage. "Active alone": the
others are not even projected (`stats="active"`; a rival is given the rows that have one), which is
the only way in which a rival saves anything.

The floor: the GEMMs that the schedule must do, 1 + 2a, 1 + 3a or 3a of 2 T V D flops, with operands
and sums of the dtypes that ours have, timed in the same run. Logits have a standard deviation of 3,
so hardly any block of them is as flat as the filter of Apple's CCE looks for. Errors are against
float64, over the first rows: of the loss absolute, of a gradient as a share of what it is of, the
largest or the mean entry.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from rft_kernels.linear import gemm
from torch import Tensor

from bench.device import ACTIVE_SHARES, Bench, Calls, errors, run
from bench.policy_loss import clipped
from bench.rivals import Inputs, Loss, eager_loss, make_inputs, ours, rivals

# Tokens, hidden size, vocabulary: the shapes that matter most first.
CASES = [(8192, 4096, 128256), (8192, 3584, 151936), (8192, 1536, 151936), (2048, 4096, 128256)]
CASES += [(32768, 4096, 128256), (2048, 3584, 151936), (32768, 3584, 151936), (2048, 1536, 151936)]
CASES += [(32768, 1536, 151936), (8192, 4096, 151936), (8192, 3584, 128256), (8192, 1536, 128256)]
CASES += [(2048, 4096, 151936), (32768, 4096, 151936), (2048, 3584, 128256), (2048, 1536, 128256)]
CASES += [(32768, 3584, 128256), (32768, 1536, 128256)]
SMOKE_CASES = [(40, 16, 331)]
ERROR_ROWS = 2048
LOGIT_STD = 3.0

_CLASSES = 16384  # of the weight at a time, in float64
_FLOOR_ROWS = 8192  # of logits at a time, in the bare GEMMs
_ALONE = ", active alone"
_FLOORS = ("bare GEMMs, 1 + 2a", "bare GEMMs, 1 + 3a", "bare GEMMs, 3a")

Found = tuple[Tensor, Tensor, Tensor]  # the loss, its gradients by hidden states and weight


def both(loss: Loss, x: Inputs) -> Found:
    value = loss(x)
    return value.detach(), *torch.autograd.grad(value, (x.hidden, x.weight))


def both_of(x: Inputs, y: Inputs, loss: Loss) -> tuple[Found, Found]:
    """All shapes that a compiled loss will meet."""
    return both(loss, x), both(loss, y)


def alone(loss: Loss, x: Inputs) -> Tensor:
    return loss(x.active())


def ours_into(dweight: Tensor, x: Inputs) -> Found:
    """In two passes, the gradient of the weight added to a float32 buffer of the caller."""
    value = ours(x, selecting=True, dweight=dweight)
    dhidden, _ = torch.autograd.grad(value, (x.hidden, x.weight), allow_unused=True)
    return value.detach(), dhidden, dweight


class Truth(NamedTuple):
    """In float64; the gradient of the weight is dlogits^T hidden."""

    loss: Tensor
    dhidden: Tensor  # [T, D]
    dlogits: Tensor  # [T, V]
    hidden: Tensor  # [T, D]


def truth(x: Inputs) -> Truth:
    """The weight is widened a few classes at a time."""
    hidden = x.hidden.detach().double()
    parts = x.weight.detach().split(_CLASSES)
    logits = torch.cat([hidden @ part.double().T for part in parts], -1).requires_grad_()
    log_probs = logits.gather(-1, x.targets[:, None])[:, 0] - logits.logsumexp(-1)
    loss = clipped(log_probs, x)
    (dlogits,) = torch.autograd.grad(loss, logits)
    pieces = zip(dlogits.split(_CLASSES, -1), parts, strict=True)
    dhidden = sum(piece @ part.double() for piece, part in pieces)
    return Truth(loss.detach(), dhidden, dlogits, hidden)


def shares(pairs: Iterable[tuple[Tensor, Tensor]], name: str) -> dict[str, float]:
    """Errors of found entries against true ones, of the largest and of the mean of the latter."""
    most, largest, total, size = 0.0, 0.0, 0.0, 0.0
    for found, true in pairs:
        error = (found.double() - true).abs()
        true = true.abs()
        most, largest = max(most, error.max().item()), max(largest, true.max().item())
        total, size = total + error.sum().item(), size + true.sum().item()
    return {f"max_err_{name}": most / largest, f"mean_err_{name}": total / size}


def error_columns(found: Callable[[Inputs], Found], x: Inputs, exact: Truth) -> dict[str, float]:
    loss, dhidden, dweight = found(x)
    parts = zip(dweight.split(_CLASSES), exact.dlogits.split(_CLASSES, -1), strict=True)
    return (
        errors(loss, exact.loss, "loss")
        | shares([(dhidden, exact.dhidden)], "dhidden")
        | shares(((part, piece.T @ exact.hidden) for part, piece in parts), "dweight")
    )


def bare_gemms(x: Inputs) -> Calls:
    """The products of each schedule, by `_FLOORS`, and nothing else."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    operands = gemm.operand_dtypes(hidden.dtype, torch.float32, hidden.device)
    (h, w), (dh, dw) = ([y.to(dtype) for y in (hidden, weight)] for dtype in operands)
    num_rows, num_active = min(len(h), _FLOOR_ROWS), len(x.active_rows)
    dlogits = torch.randn(num_rows, len(w), device=h.device, dtype=operands[1])

    def call(projected: tuple[int, ...]) -> None:
        logits = torch.empty(num_rows, len(w), device=h.device)
        dhidden = torch.empty_like(h, dtype=torch.float32)
        dweight = torch.empty_like(w, dtype=torch.float32)
        for count in projected:
            for rows in h[:count].split(num_rows):
                gemm.mm(rows, w.t(), logits[: len(rows)])
        product = gemm.mm
        for rows, out in zip(*(y[:num_active].split(num_rows) for y in (dh, dhidden)), strict=True):
            gemm.mm(dlogits[: len(rows)], dw, out)
            product(dlogits[: len(rows)].t(), rows, dweight)
            product = gemm.addmm

    schedules = ((len(h),), (len(h), num_active), (num_active,))
    return {name: partial(call, rows) for name, rows in zip(_FLOORS, schedules, strict=True)}


def floor_of(name: str) -> str:
    if name in _FLOORS:
        return name
    if name.endswith(_ALONE):
        return _FLOORS[2]
    return _FLOORS[1] if "two passes" in name else _FLOORS[0]


def measure(bench: Bench, num_tokens: int, width: int, vocab_size: int) -> None:
    facts = {"T": num_tokens, "D": width, "V": vocab_size, "dtype": "bfloat16"}
    torch.manual_seed(0)
    like = {"dtype": torch.bfloat16, "device": bench.device}
    hidden = torch.empty(num_tokens, width, **like).normal_().requires_grad_()
    std = LOGIT_STD / width**0.5
    weight = torch.empty(vocab_size, width, **like).normal_(std=std).requires_grad_()
    dweight = torch.empty_like(weight, dtype=torch.float32)
    others = rivals(bench)
    for share in ACTIVE_SHARES[::2] if bench.smoke else ACTIVE_SHARES:
        x = make_inputs(hidden, weight, share)
        few = x.first(ERROR_ROWS)
        exact = truth(few)
        losses: dict[str, Loss] = {
            "ours, one pass": ours,
            "ours, two passes": partial(ours, selecting=True),
            f"ours, one pass{_ALONE}": partial(ours, stats="active"),
        }
        if share == 1:
            losses |= others | bench.compiled(eager_loss, partial(both_of, x, few), facts)
        else:
            losses |= {f"{name}{_ALONE}": partial(alone, loss) for name, loss in others.items()}
        found = {name: partial(both, loss) for name, loss in losses.items()}
        found["ours, two passes, dW into float32"] = partial(ours_into, dweight)
        calls, columns = {}, {}
        for name, call in found.items():
            dweight.zero_()
            columns[name] = bench.attempt(name, partial(error_columns, call, few, exact))
            if columns[name]:
                columns[name]["lacks"] = "entropy" if "(no entropy)" in name else "nothing"
                calls[name] = partial(call, x)
        del exact
        if not calls:
            continue  # none fits
        floors = bare_gemms(x)
        columns |= {name: dict.fromkeys(columns[next(iter(calls))], "") for name in floors}
        bench.add(
            facts | {"pass": "both", "active": share},
            calls | floors,
            share=1 / len(ACTIVE_SHARES),
            floor_of=floor_of,
            result_bytes=lambda name: hidden.nbytes + (weight.nbytes if "into" not in name else 0),
            columns=columns,
        )


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        cases=CASES,
        smoke_cases=SMOKE_CASES,
        tests=["tests/kernels/test_linear.py", "tests/gpu/test_gpu.py"],
        smoke_test="tests/kernels/test_linear.py::test_weight_gradients_are_added_to_a_buffer",
    )
