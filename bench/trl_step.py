"""A step in TRL: its own GRPOTrainer, and `PrefixGRPOTrainer` with either head.

    python -m bench.trl_step [--steps 4] [--out FILE.csv]

A Qwen2 of random weights in float32 with 32,000 classes; 32 rollouts of up to 64 tokens a step, in
micro-batches of 8. Each trainer has a process of its own. `step_s` is a step with its generation;
`micro_batch_s` and `peak_mib` are of forward and backward of a micro-batch that generates nothing.
The first step is not counted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOTrainer

from bench.harness import in_fresh_process, machine, peak_above_mib, write_rows
from prefix_rft.integrations.trl import PrefixGRPOConfig, PrefixGRPOTrainer

KINDS = {"TRL": None, "ours, TRL's loss": "trl", "ours, one pass": "fused"}
NUM_CLASSES, NUM_PARTS = 32_000, 4


def measure(kind: str, steps: int) -> dict[str, float]:
    """Medians over the steps after the first."""
    parts: list[tuple[float, float]] = []
    whole: list[float] = []
    base = GRPOTrainer if KINDS[kind] is None else PrefixGRPOTrainer

    class Timed(base):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            found = []
            start, index = time.perf_counter(), self._step
            peak = peak_above_mib(lambda: found.append(base.training_step(self, *args, **kwargs)))
            seconds = time.perf_counter() - start
            if index % NUM_PARTS:
                parts.append((seconds, peak))
                whole[-1] += seconds
            else:
                whole.append(seconds)
            return found[0]

    names = [chr(code) for code in range(32, 127)]
    names += [f"<{i}>" for i in range(NUM_CLASSES - len(names) - 2)]
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", *names])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=NUM_CLASSES, hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=256, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    rows = [{"prompt": f"say {i} ", "completion": "one two three " * 4} for i in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        options = PrefixGRPOConfig(
            folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=NUM_PARTS,
            num_generations=8, max_completion_length=64, disable_tqdm=True,
            gradient_checkpointing=False, logging_strategy="no", head=KINDS[kind] or "trl",
        )  # fmt: skip
        Timed(
            model=AutoModelForCausalLM.from_config(config),
            reward_funcs=lambda completions, **columns: [float(len(c) % 2) for c in completions],
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train()
    later = parts[NUM_PARTS - 1 :]
    return {
        "step_s": statistics.median(whole[1:]),
        "micro_batch_s": statistics.median(seconds for seconds, _ in later),
        "peak_mib": statistics.median(peak for _, peak in later),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.kind:
        print(json.dumps(measure(options.kind, options.steps)))
        return
    rows = []
    for kind in KINDS:
        given = ["--kind", kind, "--steps", str(options.steps)]
        rows.append({"trainer": kind} | in_fresh_process("bench.trl_step", given) | machine())
    write_rows(rows, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
