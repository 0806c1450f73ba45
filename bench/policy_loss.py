"""`prefix_rft_loss` from logits, forward and backward, against its rivals and the floor.

    python -m bench.policy_loss [--smoke] [--out FILE.csv] [--budget-s 180]

The floor is (2 + a) T V bytes at the speed of a copy measured in the same run: the logits read, the
active share a of them read again, the gradient written. "selected": `selected_mask` is given.
Errors are against float64, over the first rows, of the loss of those rows; Liger's, whose
advantages are of sequences, against that loss of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import rft_kernels
import torch
from torch import Tensor

from bench.device import ACTIVE_SHARES, CASES, SMOKE_CASES, Bench, errors, optional, run
from bench.token_stats import eager

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
    return clipped_sum(log_probs - batch.old_log_probs, batch.advantages) / batch.normalizer


def clipped_sum(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).sum()


def eager_loss(logits: Tensor, batch: Batch) -> Tensor:
    """What a trainer writes; the entropy is what selection would take."""
    log_probs, entropy = eager(logits, batch.targets)
    return clipped(log_probs, batch) + 0 * entropy.detach().sum()


def rivals(bench: Bench, facts: dict, compile_for: Callable[[Loss], Any]) -> dict[str, Loss]:
    """Every rival installed; those that are Triton kernels need CUDA."""
    found: dict[str, Loss] = {"eager": eager_loss} | bench.compiled(eager_loss, compile_for, facts)
    if bench.device.type != "cuda":
        return found
    trl = optional("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    liger = optional("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    flash = optional("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    if trl is not None:
        found["TRL stats + eager objective"] = lambda x, b: clipped(trl(x, b.targets)[0], b)
    if liger is not None:
        found["Liger GRPO (no entropy)"] = partial(liger_loss, liger)
    if flash is not None:
        found["flash-attn CE (no entropy) + eager objective"] = lambda x, b: clipped(
            -flash(x, b.targets)[0], b
        )
    return found


def liger_loss(function: Callable, logits: Tensor, batch: Batch) -> Tensor:
    """As sequences, of one advantage each, whose last row predicts nothing."""
    targets, old, advantages = _by_sequence(batch)
    loss, _, _ = function(
        logits.view(NUM_SEQUENCES, -1, logits.shape[-1]), old.contiguous(), None,
        targets.contiguous(), advantages.contiguous(), temperature=1.0, beta=0.0, eps_high=0.2,
        inplace=False,
    )  # fmt: skip
    return loss.sum() / batch.normalizer


def exact_liger(logits: Tensor, batch: Batch) -> Tensor:
    """What `liger_loss` defines, in plain torch."""
    targets, old, advantages = _by_sequence(batch)
    log_p = torch.log_softmax(logits, -1).view(NUM_SEQUENCES, -1, logits.shape[-1])[:, :-1]
    log_probs = log_p.gather(-1, targets[..., None])[..., 0]
    return clipped_sum(log_probs - old, advantages[:, None]) / batch.normalizer


def _by_sequence(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and old log-probs [B, L - 1], advantages [B] of the first rows."""
    rows = (NUM_SEQUENCES, -1)
    targets, old = (x.view(rows)[:, :-1] for x in (batch.targets, batch.old_log_probs))
    return targets, old, batch.advantages.view(rows)[:, 0]


def both(loss: Loss, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    value = loss(logits, batch)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def error_columns(
    found: Callable[[Tensor, Batch], tuple[Tensor, Tensor]],
    exact: Loss,
    logits: Tensor,
    batch: Batch,
) -> dict[str, float]:
    """Errors of a loss and its gradient on the first rows, `exact` given these in float64."""
    few = logits.detach()[:ERROR_ROWS]
    value, dlogits = found(few.clone().requires_grad_(), batch)
    truth, expected = both(exact, few.double().requires_grad_(), batch)
    return errors(value, truth, "loss") | errors(dlogits, expected, "dlogits")


def exact_loss(logits: Tensor, batch: Batch) -> Tensor:
    log_p = torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None])[:, 0]
    return clipped(log_p, batch)


def measure(bench: Bench, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits, facts = bench.logits(num_tokens, vocab_size, dtype)
    if logits is None:
        return
    scratch = logits.detach().clone().requires_grad_()
    losses: dict[str, Loss] = {
        "ours": partial(ours, selected=False),
        "ours, selected": partial(ours, selected=True),
        "ours, selected, in place": partial(ours, selected=True, inplace=True),
    }

    def compile_for(batch: Batch, few: Batch, loss: Loss) -> None:
        both(loss, logits, batch)
        error_columns(partial(both, loss), exact_loss, logits, few)

    for share in ACTIVE_SHARES:
        batch, few = Batch(logits, share), Batch(logits, share, num_rows=ERROR_ROWS)
        here = losses
        if share == 1:  # the same work whatever the share
            here = losses | rivals(bench, facts, partial(compile_for, batch, few))
        calls, wrong = {}, {}
        for name, loss in here.items():
            in_place = name.endswith("in place")
            exact = exact_liger if "Liger" in name else exact_loss
            wrong[name] = bench.attempt(
                name, partial(error_columns, partial(both, loss), exact, logits, few)
            )
            if wrong[name]:
                calls[name] = partial(both, loss, scratch if in_place else logits, batch)
        bench.add(
            facts | {"pass": "both", "active": share},
            calls,
            floor_bytes=(2 + share) * logits.nbytes,
            share=0.25,
            columns=wrong,
        )


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        cases=CASES,
        smoke_cases=SMOKE_CASES,
        tests=["tests/kernels/test_policy_loss.py", "tests/kernels/test_policy_loss_triton.py"],
        smoke_test="tests/kernels/test_policy_loss.py::test_inplace_backward",
    )
