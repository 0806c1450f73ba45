"""`prefix_rft_loss` from logits, forward and backward, against its rivals and the floor.

    python -m bench.policy_loss [--smoke] [--out FILE.csv] [--budget-s 180]

The floor is (2 + a) T V bytes at the speed of a copy measured in the same run: the logits read, the
active share a of them read again, the gradient written. "selected": `selected_mask` is given.
Errors are against float64, over the first rows, of the loss of those rows.
"""

from collections.abc import Callable
from functools import partial

import rft_kernels
import torch
from torch import Tensor

from bench.device import Bench, errors, optional
from bench.token_stats import ACTIVE_SHARES, CASES, SMOKE_CASES, compiled, eager

ERROR_ROWS = 64
NUM_SEQUENCES = 8  # of the rival whose advantages are of sequences

Loss = Callable[[Tensor, "Batch"], Tensor]


class Batch:
    """T tokens, mildly off-policy, a fifth of prefixes; the active share has an advantage."""

    def __init__(self, logits: Tensor, share: float, *, num_rows: int | None = None) -> None:
        num_tokens = len(logits)
        device, rand = logits.device, torch.Generator(logits.device).manual_seed(1)
        self.targets = torch.randint(logits.shape[1], (num_tokens,), device=device, generator=rand)
        with torch.no_grad():
            log_probs = rft_kernels.token_stats(logits, self.targets).log_probs
        noise = torch.randn(num_tokens, device=device, generator=rand)
        self.old_log_probs = log_probs + 0.05 * noise
        drawn = torch.rand(num_tokens, device=device, generator=rand)
        signs = torch.where(drawn < 0.5, 1.0, -1.0)
        place = torch.rand(num_tokens, device=device, generator=rand).argsort().argsort()
        self.advantages = torch.where(place < share * num_tokens, signs, 0.0)
        self.prefix_mask = torch.rand(num_tokens, device=device, generator=rand) < 0.2
        self.response_mask = torch.ones_like(self.prefix_mask)
        self.normalizer = num_tokens
        if num_rows is not None:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value[:num_rows])


def ours(logits: Tensor, batch: Batch, *, selected: bool, inplace: bool = False) -> Tensor:
    return rft_kernels.prefix_rft_loss(
        logits, batch.targets, batch.old_log_probs, batch.advantages, batch.response_mask,
        batch.prefix_mask, normalizer=batch.normalizer, fraction=1,
        selected_mask=batch.prefix_mask if selected else None, inplace_backward=inplace,
    ).loss  # fmt: skip


def clipped(log_probs: Tensor, batch: Batch) -> Tensor:
    ratio = (log_probs - batch.old_log_probs).exp()
    bounded = ratio.clamp(0.8, 1.2)
    terms = torch.maximum(-batch.advantages * ratio, -batch.advantages * bounded)
    return terms.sum() / batch.normalizer


def eager_loss(logits: Tensor, batch: Batch) -> Tensor:
    """What a trainer writes; the entropy is what selection would take."""
    log_probs, entropy = eager(logits, batch.targets)
    return clipped(log_probs, batch) + 0 * entropy.detach().sum()


def rivals(bench: Bench, shape: tuple[int, int]) -> dict[str, Loss]:
    """Every rival installed; those that are Triton kernels need CUDA."""
    found: dict[str, Loss] = {"eager": eager_loss} | compiled(eager_loss, bench, shape)
    if bench.device.type != "cuda":
        return found
    trl = optional("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    liger = optional("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    if trl is not None:
        found["TRL stats + eager objective"] = lambda x, b: clipped(trl(x, b.targets)[0], b)
    if liger is not None:
        found["Liger GRPO (no entropy)"] = partial(_liger, liger)
    return found


def _liger(function: Callable, logits: Tensor, batch: Batch) -> Tensor:
    """As sequences, of one advantage each, whose last row predicts nothing."""
    rows = (NUM_SEQUENCES, -1)
    targets, old = (x.view(rows)[:, :-1] for x in (batch.targets, batch.old_log_probs))
    loss, _, _ = function(
        logits.view(*rows, logits.shape[-1]), old.contiguous(), None, targets.contiguous(),
        batch.advantages.view(rows)[:, 0].contiguous(), temperature=1.0, beta=0.0, eps_high=0.2,
        inplace=False,
    )  # fmt: skip
    return loss.sum() / batch.normalizer


def error_columns(loss: Loss, logits: Tensor, batch: Batch) -> dict[str, float]:
    results = []
    for function, dtype in ((eager_loss_64, torch.float64), (loss, logits.dtype)):
        leaf = logits.detach()[:ERROR_ROWS].to(dtype, copy=True).requires_grad_()
        value = function(leaf, batch)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    (truth, expected), (found, dlogits) = results
    return errors(found, truth, "loss") | errors(dlogits, expected, "dlogits")


def eager_loss_64(logits: Tensor, batch: Batch) -> Tensor:
    log_p = torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None])[:, 0]
    return clipped(log_p, batch)


def measure(bench: Bench, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> None:
    num_bytes = num_tokens * vocab_size * dtype.itemsize
    if not bench.fits(3 * num_bytes, f"T={num_tokens} V={vocab_size} {dtype}"):
        return
    torch.manual_seed(0)
    logits = torch.empty(num_tokens, vocab_size, dtype=dtype, device=bench.device)
    logits.normal_(std=3).requires_grad_()
    scratch = logits.detach().clone().requires_grad_()
    facts = {"T": num_tokens, "V": vocab_size, "dtype": str(dtype).removeprefix("torch.")}
    losses: dict[str, Loss] = {
        "ours": partial(ours, selected=False),
        "ours, selected": partial(ours, selected=True),
        "ours, selected, in place": partial(ours, selected=True, inplace=True),
    }
    others = rivals(bench, (num_tokens, vocab_size))
    for share in ACTIVE_SHARES:
        batch, few = Batch(logits, share), Batch(logits, share, num_rows=ERROR_ROWS)
        calls, wrong = {}, {}
        for name, loss in (losses | (others if share == 1 else {})).items():
            in_place = name.endswith("in place")
            calls[name] = partial(_both, loss, scratch if in_place else logits, batch)
            if "Liger" in name:  # another loss: it has fewer advantages
                wrong[name] = dict.fromkeys(wrong["ours"], float("nan"))
            else:
                wrong[name] = bench.attempt(name, partial(error_columns, loss, logits, few))
        calls = {name: call for name, call in calls.items() if wrong[name]}
        first = len(bench.rows)
        here = facts | {"pass": "both", "active": share}
        bench.add(here, calls, floor_bytes=(2 + share) * num_bytes, share=0.25)
        for row in bench.rows[first:]:
            row |= wrong[row["variant"]]


def _both(loss: Loss, logits: Tensor, batch: Batch) -> None:
    torch.autograd.grad(loss(logits, batch), logits)


def main() -> None:
    bench = Bench(
        __doc__,
        tests=["tests/kernels/test_policy_loss.py", "tests/kernels/test_triton.py"],
        smoke_test="tests/kernels/test_policy_loss.py::test_inplace_backward",
    )
    for shape in bench.shapes(SMOKE_CASES if bench.smoke else CASES):
        measure(bench, *shape)
    bench.finish()


if __name__ == "__main__":
    main()
