"""Rows of all shapes, tokenizers that show what became of them, and files of rows."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefix_rft.config import Config, config_from_dict

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, ids from 1000; the special token <bos> must never be added."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<bos>", *characters], start=1000)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1001)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", chat_template=TEMPLATE
    )
    assert tokenizer("a")["input_ids"][0] == 1001
    return tokenizer


def flat(num_rows, **columns):
    return [
        {"prompt": f"q{i}", "answer": str(i), "demonstration": f"so it is {i}"} | columns
        for i in range(num_rows)
    ]


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


VERL = {
    "data_source": "openr1",
    "prompt": messages(("system", "think"), ("user", "1+1?")),
    "target": messages(("assistant", "one more than one is 2")),
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}
OPENR1 = {
    "problem": "1+1?",
    "solution": "trivial",
    "answer": "2",
    "generations": ["it is 3", "cut off", "it is 2", "also 2"],
    "correctness_math_verify": [False, True, True, True],
    "correctness_llama": None,
    "is_reasoning_complete": [True, False, True, True],
    "messages": messages(("user", "1+1?"), ("assistant", "it is 3")),
}


EMPTY = "<think>\n\n</think>\n\n"


UNUSABLE = flat(3) + [
    {"prompt": " ", "answer": "1"},
    {"prompt": None, "answer": "1"},
    {"prompt": messages(("user", "a"), ("assistant", "b")), "answer": "1"},
    {"prompt": [], "answer": "1"},
    {"prompt": [{"role": "user"}], "answer": "1"},
    {"prompt": "q", "answer": None},
    {"prompt": "q", "answer": "  "},
    {"prompt": "q", "answer": float("nan")},
    {"prompt": "q", "answer": True},
    {"prompt": "q", "answer": "$$"},
    {"prompt": "q", "answer": "???"},
    {"prompt": "q", "answer": "t(0,4]"},
    {"prompt": "x" * 45, "answer": "1"},
    {"prompt": "q", "answer": "1", "demonstration": "y" * 20},
    {"prompt": "q", "answer": "1", "demonstration": "z"},
    {"prompt": "q", "answer": "1", "demonstration": ""},
    {"prompt": "x" * 44, "answer": "1", "demonstration": "y" * 19},
]


SPELLED = {character: i for i, character in enumerate("<unk> \n:>abx▁The]")}


def bpe(*merges, normalizer=None, pre_tokenizer=None):
    """A tokenizer that merges what is given; its prompts are the user's text and ">xa" or "]"."""
    vocabulary = dict(SPELLED)
    for merge in merges:
        vocabulary.setdefault("".join(merge), 100 + len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_config(**data) -> Config:
    return config_from_dict({"data": data, "rollout": {"max_response_length": 200}})
