"""A trainer over a tiny random model, whose rewards are a rule on the text."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from prefix_rft.config import Config, config_from_dict
from prefix_rft.data_types import Problem
from prefix_rft.model import Policy
from prefix_rft.reward import Score
from prefix_rft.rollout.transformers_engine import TransformersEngine
from prefix_rft.trainer import Trainer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-= \n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def make_model(vocab_size: int, *, seed: int = 0) -> Qwen2ForCausalLM:
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
    )
    return Qwen2ForCausalLM(config)


class RuleRewarder:
    """Scores by `rule(text, problem)`; problem 0 is always right, so that its group is left out."""

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
    )
