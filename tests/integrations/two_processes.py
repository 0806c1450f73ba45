"""One optimizer step of `PrefixGRPOTrainer` in as many processes as started it; see test_trl.py.

OUT HEAD: where rank 0 writes the gradients, logged figures and rollouts. What a rollout says is a
function of its prompt, prefix and place, so that it does not depend on the number of processes.
"""

import os
import random
import sys

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from prefix_rft.integrations.trl import PrefixGRPOConfig, PrefixGRPOTrainer
from tests.tiny import make_model, make_tokenizer

out, head = sys.argv[1:]
rollouts = []


def invent(self, prompt_ids, images, fields, num_generations, *others):
    first, found = self.accelerator.process_index * len(prompt_ids), []
    for i, ids in enumerate(prompt_ids):
        rng = random.Random(f"{first + i} {ids}")
        found.append([rng.randrange(2, 40) for _ in range(rng.randrange(1, 24))])
    own = [(tuple(ids), tuple(ends)) for ids, ends in zip(prompt_ids, found, strict=True)]
    rollouts.extend(gather_object(own))
    return found, None


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.grads = {
            name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()
        }


def reward(completions: list[str], **columns: object) -> list[float]:
    return [float(sum(map(ord, text)) % 3 == 0) for text in completions]


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = invent
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer, keep = make_tokenizer(), Keep()
    texts = [(f"add {i}+{2 * i} ", f"{i}+{2 * i}={3 * i} is it" + "+" * i) for i in range(4)]
    trainer = PrefixGRPOTrainer(
        model=make_model(len(tokenizer)),
        reward_funcs=reward,
        args=PrefixGRPOConfig(
            output_dir=out + ".d",
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4 // num_processes,
            num_generations=4,
            max_completion_length=24,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            prefix_schedule="uniform",
            loss_type="dapo",
            head=head,
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c in texts]),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history[0]
        torch.save({"grads": keep.grads, "log": log, "rollouts": rollouts}, out)
    if dist.is_initialized():
        dist.destroy_process_group()
