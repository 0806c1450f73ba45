"""A trainer, and a run, over a tiny random model, whose rewards are a rule on the text."""

import copy
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from prefix_rft.config import Config, config_from_dict, make_method
from prefix_rft.data_types import Problem
from prefix_rft.model.policy import Policy
from prefix_rft.reward.reward import Score
from prefix_rft.rollout.transformers_engine import TransformersEngine
from prefix_rft.train.reference import Reference
from prefix_rft.train.trainer import Trainer

CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-= \n"


def make_tokenizer(step: int = 1) -> PreTrainedTokenizerFast:
    """One token a character; ids are multiples of `step`."""
    vocabulary = {token: i * step for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def make_model(vocab_size: int, *, seed: int = 0, tied: bool = False) -> Qwen2ForCausalLM:
    """Random weights, large enough for distributions that are not flat; 4 padded columns."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


class RuleRewarder:
    """Scores by `rule(text, problem)`; problem 0 is always right, so that its group is left out."""

    in_background = False

    def __init__(self) -> None:
        self.rule = lambda text, problem: float(problem.index == 0 or sum(map(ord, text)) % 3 == 0)

    def score(self, completions: list[str], problems: list[Problem]) -> list[Score]:
        rewards = map(self.rule, completions, problems)
        return [Score(reward=r, status="correct" if r else "wrong") for r in rewards]

    def has_answer(self, text: str) -> bool:
        return "=" in text


def make_problems(tokenizer: PreTrainedTokenizerFast, num_problems: int) -> list[Problem]:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = [(f"add {i}+{2 * i}", f"{i}+{2 * i}={3 * i}") for i in range(num_problems)]
    return [
        Problem(
            index=i,
            prompt=prompt,
            prompt_ids=ids(prompt),
            answer=str(3 * i),
            demonstration=demonstration,
            demonstration_ids=ids(demonstration),
        )
        for i, (prompt, demonstration) in enumerate(texts)
    ]


def make_trainer(values: dict, *, num_problems: int = 4) -> Trainer:
    """A trainer in the state of step 0; `values` are those of a configuration file."""
    config: Config = config_from_dict(values)
    tokenizer = make_tokenizer()
    dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
    model = make_model(len(tokenizer)).to(dtype)
    policy = Policy(model, temperature=config.rollout.temperature, vocab_size=len(tokenizer))
    engine = TransformersEngine(
        model,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        max_batch_sequences=config.rollout.max_batch_sequences,
    )
    return Trainer(
        config,
        policy=policy,
        tokenizer=tokenizer,
        engine=engine,
        rewarder=RuleRewarder(),
        problems=make_problems(tokenizer, num_problems),
        reference=make_reference(config, policy),
    )


def make_reference(config: Config, policy: Policy) -> Reference | None:
    """The policy as it is now, where the method of `config` has a use for a reference."""
    if not make_method(config, eos_token_id=0).uses_reference:
        return None
    return Reference(policy=copy.deepcopy(policy), update_every=config.reference.update_every)


def make_run(folder: Path, *, tied: bool = False, **sections: dict) -> Config:
    """The configuration of a run of a few steps over a tiny random model and a file of problems.

    Args:
        folder: where model, data and run folder go.
        sections: fields by section, over those given here.
    """
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    make_model(len(tokenizer), tied=tied).save_pretrained(folder / "base")
    rows = [
        {"prompt": f"add {i}+{i}", "answer": str(2 * i), "demonstration": f"{i}+{i}={2 * i}\n"}
        for i in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data": {"path": str(folder / "data.jsonl"), "num_eval": 4, "max_prompt_tokens": 32},
        "model": {"path": str(folder / "base"), "device": "cpu"},
        "reward": {"function": "tests.tiny:even_length"},
        "rollout": {"group_size": 4, "max_response_length": 16},
        "optimizer": {"lr": 1e-3},
        "trainer": {
            "num_steps": 4,
            "prompts_per_step": 4,
            "prompts_per_update": 2,
            "checkpoint_every": 2,
            "sample_every": 2,
        },
        "eval": {"num_samples": 2},
        "log": {"progress": "plain"},
    }
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return config_from_dict({"name": "tiny", "output_dir": str(folder / "run")} | values)


def even_length(completions: list[str], **columns: object) -> list[float]:
    """A reward that needs no mathematics."""
    return [float(len(text) % 2 == 0) for text in completions]


def nonsense_on_rank_1(completions: list[str], **columns: object) -> list[float]:
    """`even_length`, until the file $METRICS knows of two steps: then rank 1 has no rewards."""
    metrics = Path(os.environ["METRICS"])
    is_late = metrics.exists() and metrics.read_text().count('"kind": "train"') >= 2
    return [] if is_late and os.environ["RANK"] == "1" else even_length(completions)
