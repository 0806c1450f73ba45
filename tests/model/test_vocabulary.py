"""The ids of a tokenizer: how many columns they need, and which end a response."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.model.policy import Policy
from prefix_rft.model.vocabulary import end_of_response_id, stop_token_ids, vocabulary_size
from prefix_rft.train.run import evaluate_model, train
from prefix_rft.train.trainer import Trainer
from tests.tiny import CHAT_TEMPLATE, make_model, make_run
from tests.tiny import make_tokenizer as make_tiny_tokenizer

EOS, IM_START, IM_END = 10, 11, 12
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None, *, special: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghij")}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokens = ["<|im_start|>", "<|im_end|>", "</s>", "<|im_end|>!"]
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    tokenizer.chat_template = template
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", *tokens]) == [10, 11, 12, 13, 14]
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, IM_END),
        (CHATML.replace("{{ m.content }}<", "{{ m.content }} <"), IM_END),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), EOS),
        (CHATML.replace("<|im_end|>", "</s>"), 13),
        (CHATML.replace("<|im_end|>", "<|im_end|>!"), 14),
        (CHATML.replace("<|im_end|>", ""), EOS),  # nothing stands at the end
        (CHATML.replace("<|im_end|>", "and <|im_end|>"), EOS),  # a text does
        (CHATML.replace("{{ m.content }}", ""), EOS),  # the end of nothing
        ("{{ raise_exception('no') }}", EOS),
        (None, EOS),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_chat_template_tells_what_ends_a_response(template, expected, special):
    tokenizer = make_tokenizer(template, special=special)
    assert end_of_response_id(tokenizer) == expected
    assert stop_token_ids(tokenizer, None) == tuple(sorted({EOS, expected}))


def test_sft_teaches_the_end_that_stops_generation():
    config = config_from_dict({"method": {"name": "sft"}})
    policy = Policy(make_model(8), temperature=1.0, vocab_size=8)
    parts = {"policy": policy, "engine": None, "rewarder": None, "problems": []}
    for template, expected in ((CHATML, IM_END), (None, EOS)):
        trainer = Trainer(config, tokenizer=make_tokenizer(template), **parts)
        assert trainer.method.setting.eos_token_id == expected


def test_everything_that_ends_a_completion():
    tokenizer = make_tokenizer(CHATML)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=3), [7]) == (3, 7, EOS, IM_END)
    config = GenerationConfig(eos_token_id=[EOS, 2])
    assert stop_token_ids(tokenizer, config) == (2, EOS, IM_END)


def test_a_run_whose_tokenizer_has_holes(tmp_path):
    """Ids beyond the number of tokens are trained on and sampled."""
    config = make_run(tmp_path, trainer={"num_steps": 1})
    tokenizer = make_tiny_tokenizer(step=3)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    size = vocabulary_size(tokenizer)
    assert size == 3 * len(tokenizer) - 2
    make_model(size).save_pretrained(tmp_path / "base")
    summary = train(config)
    assert summary["trained"]["num_problems"] == 4
    (record,) = [
        record
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == "train"
    ]
    assert record["rollout/log_prob_gap_max"] < 1e-4
    make_model(size - 5).save_pretrained(tmp_path / "base")  # with 4 padded columns
    message = f"the tokenizer has ids up to {size - 1}, the lm_head {size - 1} columns"
    with pytest.raises(ConfigError, match=message):
        evaluate_model(config, str(tmp_path / "base"))


def test_a_vocabulary_ends_behind_its_largest_id():
    vocabulary = {"a": 0, "b": 1, "c": 90, "<eos>": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert len(tokenizer) == 4 and vocabulary_size(tokenizer) == 91
