"""verl's actor forward on a tiny model, its own fused head and these kernels: loss, time, memory.

python kernels/examples/verl_actor.py

The model is random; verl's Triton head is used on a CUDA device, its torch head elsewhere.
"""

import multiprocessing
import sys
import time
from pathlib import Path
from types import MethodType

import torch
from rft_kernels.adapters import verl as adapter
from transformers import AutoConfig, AutoModelForCausalLM

try:
    from verl.models.transformers import dense_common
except ImportError as error:
    sys.exit(
        f"verl cannot be imported: {error}\n"
        "It wants an environment of its own, as it pins an older transformers:\n"
        "    pip install verl==0.9.1\n"
        "    PYTHONPATH=kernels python kernels/examples/verl_actor.py"
    )

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIB = 2**20


def run(patched: bool, num_tokens: int = 2048, vocab_size: int = 32000) -> tuple[float, ...]:
    """Loss, norm of the head's gradient, seconds and MiB of one forward and backward."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=vocab_size, hidden_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(DEVICE)
    head = "triton" if DEVICE == "cuda" else "torch"
    model.forward = MethodType(getattr(dense_common, f"forward_with_{head}_backend"), model)
    ids = torch.randint(vocab_size, (1, num_tokens), device=DEVICE)
    advantages = torch.randn(num_tokens, device=DEVICE)
    handle = adapter.patch() if patched else None

    before = memory_mib(reset=True)
    start = time.perf_counter()
    out = model(input_ids=ids, temperature=0.7, use_cache=False, return_dict=True)
    ratio = (out.log_probs - out.log_probs.detach()).exp().flatten()
    loss = -(advantages * ratio).mean() - 0.01 * out.entropy.mean()
    loss.backward()
    gradient = model.lm_head.weight.grad.norm().item()
    seconds = time.perf_counter() - start
    if handle is not None:
        handle.undo()
    return loss.item(), gradient, seconds, memory_mib() - before


def memory_mib(reset: bool = False) -> float:
    """Peak of the memory so far; after a reset, what is in use."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MIB
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with fresh as pool:  # a process for each, so that its peak memory is its own
        own, ours = pool.map(run, [False, True], chunksize=1)
    print(f"{'':16}{'verl':>12}{'patched':>12}")
    for name, *pair in zip(("loss", "|dlm_head|", "time, s", "peak, MiB"), own, ours, strict=True):
        print(f"{name:16}" + "".join(f"{value:>12.6g}" for value in pair))


if __name__ == "__main__":
    main()
