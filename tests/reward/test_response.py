"""What graders see of a response whose tokenizer has special tokens."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_rft.config.sections import EvalConfig, RewardConfig
from prefix_rft.data_types import Completion, Problem
from prefix_rft.evaluate import answer, summarize
from prefix_rft.reward import Rewarder, response_text

SPECIAL = ("<pad>", "<s>", "<eos>", "<|im_end|>", "<think>", "</think>")
WORDS = ("Try", "\\boxed{6}", "\\boxed{7}", "unfinished")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<eos>",
        unk_token="<pad>",
        additional_special_tokens=list(SPECIAL[3:]),
    )
    tokenizer.add_tokens(["<end_of_turn>"])  # not special, as some templates have it
    return tokenizer


def completion(tokenizer: PreTrainedTokenizerFast, text: str, reason: str = "stop") -> Completion:
    ids = tuple(tokenizer.convert_tokens_to_ids(text.split()))
    return Completion(token_ids=ids, log_probs=(0.0,) * len(ids), finish_reason=reason)


@pytest.mark.parametrize(
    ("text", "reason", "seen"),
    [
        ("<think> Try </think> unfinished <eos>", "stop", "<think> Try </think> unfinished"),
        ("Try <|im_end|>", "stop", "Try"),
        ("Try <end_of_turn>", "stop", "Try"),
        ("Try <|im_end|>", "length", "Try <|im_end|>"),
        ("<think> Try </think>", "length", "<think> Try </think>"),
        ("<s> Try <pad> <pad>", "length", "Try"),
        ("", "stop", ""),
    ],
)
def test_special_tokens_stay_unless_they_pad_begin_or_end(tokenizer, text, reason, seen) -> None:
    assert response_text(tokenizer, completion(tokenizer, text, reason)) == seen


def test_a_prefix_comes_first_and_keeps_its_last_token(tokenizer) -> None:
    prefix = tokenizer.convert_tokens_to_ids(["<think>", "Try", "</think>"])
    empty = completion(tokenizer, "")
    assert response_text(tokenizer, empty, prefix) == "<think> Try </think>"
    text = response_text(tokenizer, completion(tokenizer, "\\boxed{6} <eos>"), prefix)
    assert text == "<think> Try </think> \\boxed{6}"


class Says:
    """An engine that always says the same."""

    weights_version = 0

    def __init__(self, said: Completion) -> None:
        self.said = said

    def generate(self, requests, **options) -> list[Completion]:
        return [self.said] * len(requests)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<think> Try \\boxed{6} </think> unfinished <eos>", "no_answer"),
        ("<think> Try \\boxed{7} </think> \\boxed{6} <eos>", "correct"),
    ],
)
def test_a_guess_in_the_thought_is_no_answer(tokenizer, text, status) -> None:
    with Rewarder(RewardConfig(num_workers=1), "boxed") as rewarder:
        answers = answer(
            [Problem(index=0, prompt="?", prompt_ids=(1,), answer="6")],
            Says(completion(tokenizer, text)),
            rewarder,
            tokenizer,
            config=EvalConfig(num_samples=2),
            max_response_length=9,
            seed=0,
        )
    assert summarize(answers)["statuses"] == {status: 2}
