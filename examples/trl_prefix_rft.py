"""Prefix-RFT in TRL: the lines that a user of TRL writes.

    pip install '.[trl]'
    python examples/trl_prefix_rft.py                                  # a minute on a CPU
    python examples/smollm2.py SMOLLM && python examples/trl_prefix_rft.py \
        --model SMOLLM --gsm8k gsm8k_train.parquet --steps 15          # GSM8K, 135 M parameters

Without arguments model and data are made on the spot: a random model of one token a character, and
sums with their solutions. It learns nothing in so few steps; the script shows what is logged.
"""

import argparse
import re
import string
import tempfile
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prefix_rft.integrations.trl import PrefixGRPOConfig, PrefixGRPOTrainer

ASK = "Solve the problem step by step. End with a line of the form: #### <number>\n"


def last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+", text.replace(",", ""))
    return found[-1] if found else None


def is_correct(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of a completion is the answer; a function as TRL takes them."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [float(last_number(text) == gold) for text, gold in zip(texts, answer, strict=True)]


def sums() -> Dataset:
    pairs = [(i, 3 * i + 1) for i in range(64)]
    return Dataset.from_list(
        [
            {
                "prompt": f"{a}+{b}: ",
                "completion": f"{a} and {b} is {a + b}, their sum",
                "answer": str(a + b),
            }
            for a, b in pairs
        ]
    )


def gsm8k(path: str) -> Dataset:
    """Rows with messages for the prompt, and the solution in the column `completion`."""

    def row(given: dict[str, str]) -> dict[str, Any]:
        solution = re.sub(r"<<[^<>]*>>", "", given["answer"])
        return {
            "prompt": [{"role": "user", "content": ASK + given["question"]}],
            "completion": [{"role": "assistant", "content": solution}],
            "answer": last_number(solution),
        }

    rows = load_dataset("parquet", data_files=path, split="train")
    return rows.map(row, remove_columns=rows.column_names)


def tiny() -> tuple[Any, Any]:
    characters = dict.fromkeys(["<pad>", "<eos>", *string.printable[:95]])
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, merges=[]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        eos_token_id=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--gsm8k", help="the training rows as a parquet file")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default=tempfile.mkdtemp())
    options = parser.parse_args()
    model, tokenizer = tiny()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    is_small = options.gsm8k is None

    # From here on: GRPO of TRL, but for two names, the demonstrations, and their options.
    trainer = PrefixGRPOTrainer(
        model=model,
        reward_funcs=is_correct,
        args=PrefixGRPOConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            num_generations=8,
            max_completion_length=32 if is_small else 256,
            learning_rate=1e-5,
            logging_steps=1,
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            num_hybrid=1,  # of the 8 rollouts of a prompt one starts inside its demonstration
            selection_fraction=0.2,  # of its prefix the fifth with the highest entropy is learnt
        ),
        train_dataset=sums() if is_small else gsm8k(options.gsm8k),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
