"""`select_top_entropy` from a thousand to millions of tokens, against its rivals and the floor.

    python -m bench.selection [--smoke] [--out FILE.csv] [--budget-s 60]

The floor is 6 bytes a token (entropy and candidates read, the mask written) at the speed of a copy
measured in the same run; small pools are bound by launches instead. TRL's rule keeps ties of a
quantile, and needs the values on the host's call; top-k reads a count on the host.
"""

from functools import partial
from types import SimpleNamespace

import torch
from rft_kernels import select_top_entropy
from rft_kernels.adapters.trl import get_high_entropy_mask
from torch import Tensor

from bench.device import Bench, Calls, optional, run

SIZES = [2**20, 2**10, 2**14, 2**17, 2**22]
SMOKE_SIZES = [256, 1024]
NUM_SEQUENCES = 64
BYTES_A_TOKEN = 4 + 1 + 1


def top_k(entropy: Tensor, candidates: Tensor) -> Tensor:
    """Eager: the number of candidates is read on the host."""
    num_candidates = int(candidates.sum())
    k = num_candidates - num_candidates * 4 // 5
    kept = torch.where(candidates, entropy, -torch.inf).topk(k).indices
    return torch.zeros_like(candidates).index_fill_(0, kept, True)


def variants(entropy: Tensor, candidates: Tensor) -> Calls:
    bounds = torch.arange(NUM_SEQUENCES + 1, device=entropy.device)
    cu_seqlens = bounds * len(entropy) // NUM_SEQUENCES
    calls: Calls = {
        "ours, one pool": partial(select_top_entropy, entropy, candidates),
        "ours, per sequence": partial(
            select_top_entropy, entropy, candidates, cu_seqlens=cu_seqlens
        ),
        "adapter of TRL's rule": partial(get_high_entropy_mask, entropy, candidates, 0.8),
        "top-k": partial(top_k, entropy, candidates),
    }
    trainer = optional("trl.trainer.grpo_trainer", "GRPOTrainer")
    if trainer is not None:
        alone = SimpleNamespace(
            pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x
        )
        stub = SimpleNamespace(accelerator=alone)
        calls["TRL"] = partial(trainer.get_high_entropy_mask, stub, entropy, candidates, 0.8)
    return calls


def measure(bench: Bench, num_tokens: int) -> None:
    torch.manual_seed(0)
    entropy = torch.rand(num_tokens, device=bench.device) * 12
    candidates = torch.rand(num_tokens, device=bench.device) < 0.3
    calls = variants(entropy, candidates)
    wanted = int(top_k(entropy, candidates).sum())
    kept = {
        name: bench.attempt(name, lambda call=call: {"kept": int(call().sum())})
        for name, call in calls.items()
    }
    bench.add(
        {"T": num_tokens, "sequences": NUM_SEQUENCES, "kept_by_top_k": wanted},
        {name: call for name, call in calls.items() if kept[name]},
        floor_bytes=BYTES_A_TOKEN * num_tokens,
        share=0.8,
        columns=kept,
    )


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        cases=[(size,) for size in SIZES],
        smoke_cases=[(size,) for size in SMOKE_SIZES],
        tests=["tests/kernels/test_selection.py", "tests/kernels/test_selection_triton.py"],
        smoke_test="tests/kernels/test_selection.py::test_nan_ranks_last",
    )
