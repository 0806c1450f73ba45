"""TRL's GRPOTrainer on a tiny model, its own head and these kernels: loss, time and memory.

python kernels/examples/trl_grpo.py [--steps 4] [--vocab-size 32000] [--length 32]

The model is random and the reward a toy (the share of even tokens); a CUDA device is used if there
is one. Each run has a process of its own, so that its peak memory is its own.
"""

import argparse
import contextlib
import multiprocessing
import string
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rft_kernels.adapters import trl as adapter
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils import logging

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    sys.exit(f"trl cannot be imported: {error}\n    pip install trl==1.16.0")

MIB = 2**20


class Run(NamedTuple):
    losses: list[float]  # one a step
    weights: dict[str, torch.Tensor]
    update_seconds: float  # of the quickest step: one that generates nothing
    peak_mib: float  # above what was there before the first step


def train(patched: bool, *, steps: int, vocab_size: int, length: int, **options: Any) -> Run:
    """A few steps of GRPO, the same for the same arguments; options go to GRPOConfig."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, eos_token_id=1, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    prompts = ["list even numbers", "what comes next?", "2 4 6", "count by two"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        defaults = {
            "output_dir": folder, "max_steps": steps, "max_completion_length": length,
            "per_device_train_batch_size": 32, "num_generations": 8, "num_iterations": 2,
            "temperature": 0.9, "beta": 0.04, "learning_rate": 1e-3, "logging_steps": 1,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False,
            "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=share_of_even_tokens,
            args=GRPOConfig(**defaults | options),
            train_dataset=Dataset.from_dict({"prompt": prompts * 4}),
            processing_class=tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        if patched:
            stack.enter_context(adapter.patch())
        before = memory_mib(reset=True)
        trainer.train()
        peak = memory_mib() - before
    steps_taken = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        losses=[step["loss"] for step in steps_taken],
        weights={name: x.detach().cpu() for name, x in trainer.model.state_dict().items()},
        update_seconds=min(step["step_time"] for step in steps_taken),
        peak_mib=peak,
    )


def share_of_even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    tokens = ["<pad>", "<eos>", "<unk>", *string.printable]
    bare = Tokenizer(models.BPE({x: i for i, x in enumerate(tokens)}, [], unk_token="<unk>"))
    bare.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **names)


def memory_mib(reset: bool = False) -> float:
    """Peak of the memory so far; after a reset, what is in use."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MIB
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(arguments: tuple[bool, dict[str, int]]) -> Run:
    patched, sizes = arguments
    return train(patched, **sizes)._replace(weights={})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--length", type=int, default=32)
    sizes = vars(parser.parse_args())
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with fresh as pool:
        own, ours = pool.map(measure, [(False, sizes), (True, sizes)], chunksize=1)
    print(f"{'':12}{'TRL':>12}{'patched':>12}")
    for step, losses in enumerate(zip(own.losses, ours.losses, strict=True)):
        print(f"loss {step:<7}" + "".join(f"{loss:>12.6f}" for loss in losses))
    for name, field in (("update, s", "update_seconds"), ("peak, MiB", "peak_mib")):
        print(f"{name:12}" + "".join(f"{getattr(run, field):>12.2f}" for run in (own, ours)))


if __name__ == "__main__":
    main()
