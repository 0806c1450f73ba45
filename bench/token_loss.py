"""`linear_token_loss`: losses that are functions, beside the fused path, Liger's chunks and eager.

    python -m bench.token_loss [--smoke] [--out FILE.csv] [--budget-s 180]

Loss and gradients by hidden states and lm_head weight. The fused path is `linear_prefix_rft_loss`
in one pass, and the floor of all: `of_floor` is its time over the variant's. The clipped loss is
the same as a function; SFT, LUFFY's shaping and a weight that depends on the entropy are others,
the last with a second derivative a row. A rival has the clipped loss, or SFT where it says so; what
does not run on this device is left out, by name. One row in 32 is clipped, all have an advantage.
"""

from collections.abc import Callable
from functools import partial

import rft_kernels
import torch
from torch import Tensor

from bench.device import Bench, optional, run
from bench.rivals import Inputs, Loss, make_inputs, ours, rivals

# Tokens, hidden size, vocabulary, dtype.
ON_CPU = [(2048, 512, 151936, torch.float32)]
ON_CUDA = [(8192, 4096, 151936, torch.bfloat16), (2048, 1536, 151936, torch.bfloat16)]
SMOKE_CASES = [(40, 16, 331, torch.float32)]
FUSED = "ours, fused path"


def clipped(
    log_probs: Tensor, entropy: Tensor, advantages: Tensor, old_log_probs: Tensor
) -> Tensor:
    ratio = (log_probs - old_log_probs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))


def sft(log_probs: Tensor, entropy: Tensor) -> Tensor:
    return -log_probs


def luffy(log_probs: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    p = log_probs.exp()
    return -advantages * p / (p + 0.1)


def weight_of_entropy(log_probs: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    return -advantages * log_probs * torch.tanh(entropy)


def function_loss(loss_fn: Callable, names: tuple[str, ...], x: Inputs) -> Tensor:
    return rft_kernels.linear_token_loss(
        x.hidden,
        x.weight,
        x.targets,
        loss_fn,
        tokens=tuple(getattr(x, name) for name in names),
        mask=x.response_mask,
        normalizer=x.normalizer,
        active_rows=x.active_rows,
    ).loss


def liger_sft(function: type, x: Inputs) -> Tensor:
    return function.apply(x.hidden, x.weight, x.targets)[0]


def losses(bench: Bench) -> dict[str, Loss]:
    found: dict[str, Loss] = {
        FUSED: ours,
        "ours, the same as a function": partial(
            function_loss, clipped, ("advantages", "old_log_probs")
        ),
        "ours, SFT": partial(function_loss, sft, ()),
        "ours, LUFFY": partial(function_loss, luffy, ("advantages",)),
        "ours, weight of entropy": partial(function_loss, weight_of_entropy, ("advantages",)),
    }
    chosen = ("eager", "Liger")
    found |= {name: loss for name, loss in rivals(bench).items() if name.startswith(chosen)}
    module = "liger_kernel.ops.fused_linear_cross_entropy"
    if liger := optional(module, "LigerFusedLinearCrossEntropyFunction"):
        found["Liger fused linear CE (SFT)"] = partial(liger_sft, liger)
    return found


def both(loss: Loss, x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(x), (x.hidden, x.weight))


def measure(bench: Bench, num_tokens: int, width: int, vocab_size: int, dtype: torch.dtype) -> None:
    facts = {"T": num_tokens, "D": width, "V": vocab_size}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "pass": "both"}
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": bench.device}
    hidden = torch.empty(num_tokens, width, **like).normal_().requires_grad_()
    weight = torch.empty(vocab_size, width, **like).normal_(std=3 / width**0.5).requires_grad_()
    x = make_inputs(hidden, weight, share=1.0)
    bench.add(
        facts,
        {name: partial(both, loss, x) for name, loss in losses(bench).items()},
        share=1,
        floor_of=lambda name: FUSED,
        result_bytes=hidden.nbytes + weight.nbytes,
    )


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        cases=ON_CUDA if torch.cuda.is_available() else ON_CPU,
        smoke_cases=SMOKE_CASES,
        tests=["tests/kernels/test_token_loss.py"],
        smoke_test="tests/kernels/test_token_loss.py::test_the_policy_loss_is_one_of_them",
    )
