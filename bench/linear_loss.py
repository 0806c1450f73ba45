"""`linear_prefix_rft_loss` on a CPU: forward and backward, against eager and the bare GEMMs.

    python -m bench.linear_loss [--smoke] [--out FILE.csv]

Ours at several shares of active rows, in one pass (`selected_mask` given) and in two, with
statistics of all rows or (the others unseen) of the active alone; eager as a trainer would write
it; the reference; and the floor: the three GEMMs of the shapes, nothing else.
Times are taken in turns in one process, peak memory (gradients included) each in a fresh one.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rft_kernels
import rft_kernels.reference
import torch
from torch import Tensor

from bench.harness import (
    MIB,
    in_fresh_process,
    interleaved_ms,
    machine,
    peak_above_mib,
    spread,
    write_rows,
)

SHAPE = (2048, 512, 151936)  # tokens, hidden size, vocabulary
SMOKE_SHAPE = (32, 16, 503)
ACTIVE_SHARES = (1.0, 0.5, 0.25)


class Inputs:
    """One mini-batch: a fifth of it prefix tokens, all of them kept, mildly off-policy."""

    def __init__(self, num_tokens: int, width: int, vocab_size: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(num_tokens, width, requires_grad=True)
        self.weight = (torch.randn(vocab_size, width) * 0.02).requires_grad_()
        self.targets = torch.randint(vocab_size, (num_tokens,))
        self.advantages = torch.where(torch.rand(num_tokens) < 0.5, 1.0, -1.0)
        self.response_mask = torch.ones(num_tokens, dtype=torch.bool)
        self.prefix_mask = torch.rand(num_tokens) < 0.2
        with torch.no_grad():
            stats = rft_kernels.linear_token_stats(self.hidden, self.weight, self.targets)
        self.old_log_probs = stats.log_probs + 0.05 * torch.randn(num_tokens)
        self.place = torch.rand(num_tokens).argsort().argsort() / num_tokens

    def loss(
        self, op: Callable, *, share: float = 1.0, selecting: bool = False, **options: str
    ) -> Tensor:
        advantages = torch.where(self.place < share, self.advantages, 0)
        return op(
            self.hidden, self.weight, self.targets, self.old_log_probs, advantages,
            self.response_mask, self.prefix_mask, normalizer=len(self.targets),
            fraction=1, selected_mask=None if selecting else self.prefix_mask, **options,
        ).loss  # fmt: skip

    def eager(self) -> Tensor:
        logits = torch.nn.functional.linear(self.hidden, self.weight)
        log_p = torch.log_softmax(logits, -1)
        del logits
        log_probs = log_p.gather(-1, self.targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (log_probs - self.old_log_probs).exp()
        policy, bounded = -self.advantages * ratio, -self.advantages * ratio.clamp(0.8, 1.2)
        assert entropy.isfinite().all()
        return torch.maximum(policy, bounded).sum() / len(self.targets)

    def backward(self, loss: Callable[[], Tensor]) -> None:
        self.hidden.grad = self.weight.grad = None
        loss().backward()

    def gemms(self, tile: int = 256) -> None:
        """The three products, by tiles of rows, so that no more memory is touched than needed."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits = hidden.new_empty(tile, len(weight))
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, into in zip(hidden.split(tile), dhidden.split(tile), strict=True):
            part = torch.mm(rows, weight.t(), out=logits[: len(rows)])
            torch.mm(part, weight, out=into)
            dweight.addmm_(part.t(), rows)


def variants(inputs: Inputs) -> dict[str, Callable[[], None]]:
    ours = rft_kernels.linear_prefix_rft_loss
    reference = rft_kernels.reference.linear_prefix_rft_loss
    losses = {
        **{
            f"one pass, {share:g} active": partial(inputs.loss, ours, share=share)
            for share in ACTIVE_SHARES
        },
        "one pass, 0.25 active, the others unseen": partial(
            inputs.loss, ours, share=0.25, stats="active"
        ),
        "two passes, 1 active": partial(inputs.loss, ours, selecting=True),
        "two passes, 0.25 active": partial(inputs.loss, ours, selecting=True, share=0.25),
        "eager": inputs.eager,
        "reference": partial(inputs.loss, reference),
    }
    calls = {name: partial(inputs.backward, loss) for name, loss in losses.items()}
    return calls | {"three GEMMs": inputs.gemms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one repeat")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", help="print the peak memory of this variant alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_tokens, width, vocab_size = shape = SMOKE_SHAPE if options.smoke else SHAPE
    inputs = Inputs(*shape)
    calls = variants(inputs)
    if options.peak_of:
        print(json.dumps(peak_above_mib(calls[options.peak_of])))
        return
    times = interleaved_ms(calls, 1 if options.smoke else options.repeats)
    rows = []
    gradients_mib = (inputs.hidden.nbytes + inputs.weight.nbytes) / MIB
    del inputs, calls  # their memory is wanted by the fresh processes
    for name, elapsed in times.items():
        # A smoke run starts one fresh process, to see that it starts.
        arguments = ["--peak-of", name, "--threads", str(options.threads)]
        if not options.smoke:
            peak = in_fresh_process("bench.linear_loss", arguments)
        else:
            peak = float("nan")
            if not rows:
                peak = in_fresh_process("bench.linear_loss", [*arguments, "--smoke"])
        eager, gemms = (spread(times[other])["median_ms"] for other in ("eager", "three GEMMs"))
        figures = spread(elapsed)
        rows.append(
            {"variant": name, "T": num_tokens, "D": width, "V": vocab_size, "dtype": "float32"}
            | figures
            | {
                "of_eager": figures["median_ms"] / eager,
                "of_gemms": figures["median_ms"] / gemms,
                "peak_mib": peak,
                "gradients_mib": gradients_mib,
            }
            | machine()
        )
    write_rows(rows, options.out)


if __name__ == "__main__":
    main()
