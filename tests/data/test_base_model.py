"""The base model: tokenizer, training, cache, and the texts it is trained on."""

import errno
import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config
from prefix_rft.config.data_sections import BaseConfig, DataConfig, TestbedConfig
from prefix_rft.config.sections import ModelConfig
from prefix_rft.data import base_model
from prefix_rft.data.base_model import build_base, render_prompt, resolve_base, train_tokenizer
from prefix_rft.data.testbed import make_lessons, make_rows
from prefix_rft.model.loading import load_tokenizer

torch.set_num_threads(1)

TESTBED = TestbedConfig(num_train=64)
TINY = BaseConfig(
    vocab_size=300,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=32,
    max_length=128,
    num_batches=6,
    batch_size=8,
)
CORPUS = [(f"<|user|>{n}?<|assistant|>", f"{n}{n}") for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    lessons = make_lessons(TESTBED, 500, seed=0)
    return train_tokenizer([text for pair in lessons for text in pair], 320)


@pytest.fixture
def tiny(tmp_path):
    return replace(TINY, cache_dir=str(tmp_path / "bases"))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_every_text_round_trips_and_every_digit_is_a_token(tokenizer):
    rows, _ = make_rows(TESTBED, 1, seed=1)
    texts = [row[key] for row in rows for key in ("prompt", "demonstration")]
    for text in [*texts, "  1234.5 x\t²\n\n\\frac{12}{7} Größe 😀 don't <b> . ,"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        tokens = [tokenizer.decode([i]) for i in ids]
        assert [t for t in tokens if any(c.isdigit() for c in t if c in "0123456789")] == [
            c for c in text if c in "0123456789"
        ]


def test_a_vocabulary_is_learnt_and_bounded(tokenizer):
    assert 261 < len(tokenizer) <= 320
    prompt, demonstration = make_lessons(TESTBED, 1, seed=9)[0]
    text = prompt + demonstration
    assert len(tokenizer(text)["input_ids"]) < 0.7 * len(text)


def test_the_chat_template_renders_turns(tokenizer):
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|system|>S<|user|>U<|assistant|>A<|end|>"
    )
    rendered = render_prompt(tokenizer, "1+1?")
    assert rendered == "<|user|>1+1?<|assistant|>"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[::5] == ["<|user|>", "<|assistant|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_a_base_learns_its_completions_and_loads(tiny, tokenizer):
    folder = build_base(replace(tiny, num_batches=300, lr=1e-2), tokenizer, CORPUS, 0)
    model, loaded = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder, None)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    prompt = loaded(CORPUS[7][0], return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=5)[0]
    assert loaded.decode(answer) == CORPUS[7][0] + "77<|end|>"


def test_plain_auto_tokenizer_reads_the_same_ids(tiny, tokenizer):
    folder = build_base(replace(tiny, num_batches=1), tokenizer, CORPUS, 0)
    texts = ["Start with 12.\na +5\nb -13\nWhat is the result?", "it's $1,000.50 ... (x+y)^2"]
    texts += [render_prompt(tokenizer, text) for text in texts]
    assert (
        AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == (tokenizer(texts)["input_ids"])
    )


def test_a_base_is_reused_until_something_that_makes_it_changes(tiny, tokenizer, monkeypatch):
    folder = build_base(tiny, tokenizer, CORPUS, 0)
    changed = {
        build_base(replace(tiny, lr=1e-3), tokenizer, CORPUS, 0),
        build_base(tiny, tokenizer, CORPUS[:-1], 0),
        build_base(tiny, tokenizer, CORPUS, 1),
        build_base(tiny, train_tokenizer([], 261), CORPUS, 0),
    }
    assert len(changed | {folder}) == 5
    monkeypatch.setattr(base_model, "_train", None)
    assert build_base(tiny, tokenizer, CORPUS, 0) == folder


def test_the_same_inputs_make_the_same_weights(tiny, tokenizer, tmp_path):
    torch.manual_seed(1)
    first = build_base(tiny, tokenizer, CORPUS, 0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_base(replace(tiny, cache_dir=str(tmp_path / "other")), tokenizer, CORPUS, 0)
    assert first.name == second.name and first != second
    assert weights(first) == weights(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights(first) != weights(build_base(tiny, tokenizer, CORPUS, 1))


@pytest.mark.parametrize("stage", ["_train", "PreTrainedTokenizerFast.save_pretrained"])
def test_an_interrupted_build_leaves_nothing(tiny, tokenizer, monkeypatch, tmp_path, stage):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"prefix_rft.data.base_model.{stage}", stop)
    with pytest.raises(KeyboardInterrupt):
        build_base(tiny, tokenizer, CORPUS, 0)
    assert not list(tmp_path.glob("bases/*")) and not list(tmp_path.glob("bases/.*"))
    monkeypatch.undo()
    AutoModelForCausalLM.from_pretrained(build_base(tiny, tokenizer, CORPUS, 0))


def test_two_builds_at_once_end_with_one_base(tiny, tokenizer, monkeypatch):
    train = base_model._train

    def overtaken(*args):
        monkeypatch.setattr(base_model, "_train", train)
        build_base(tiny, tokenizer, CORPUS, 0)
        train(*args)

    monkeypatch.setattr(base_model, "_train", overtaken)
    folder = build_base(tiny, tokenizer, CORPUS, 0)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert folder.stat().st_mode == folder.parent.stat().st_mode  # others may read it
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_base_that_cannot_be_saved_is_an_error(tiny, tokenizer, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(base_model.Qwen2ForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        build_base(tiny, tokenizer, CORPUS, 0)
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"base.vocab_size: .* at least 261, got 260"):
        replace(TINY, vocab_size=260)


def test_the_loss_is_the_mean_over_completion_tokens_whatever_the_padding(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(build_base(tiny, tokenizer, CORPUS, 0)).double()
    texts = base_model._encode(tokenizer, [CORPUS[3], (CORPUS[4][0], "1+23=24"), CORPUS[25]], 128)
    total, count = 0.0, 0
    for ids, num_prompt in texts:
        assert ids[-1] == tokenizer.eos_token_id
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(num_prompt, len(ids)):
            total -= log_probs[position - 1, ids[position]].item()
            count += 1
    loss = base_model._mean_nll(model, texts, tokenizer.pad_token_id).item()
    assert loss == pytest.approx(total / count, abs=1e-6)


def test_batches_hold_similar_lengths_and_pass_through_all_texts(tiny):
    texts = [base_model._Text([0] * n, 1) for n in range(1, 97)]
    config = replace(tiny, num_batches=30)
    batches = list(base_model._batches(texts, config, random.Random(0)))
    assert [len(batch) for batch in batches] == [8] * 30
    lengths = [[len(text.ids) for text in batch] for batch in batches]
    assert all(max(batch) - min(batch) < 16 for batch in lengths)
    assert lengths[:16] != sorted(lengths[:16])
    assert {n for batch in lengths[:16] for n in batch} == set(range(1, 97))


def test_long_texts_are_left_out(tiny, tokenizer):
    long = [("<|user|>?<|assistant|>", "1" * 200)]
    with pytest.raises(ConfigError, match=r"base.max_length: .* of the 1 training texts, got 128"):
        build_base(tiny, tokenizer, long, 0)
    build_base(tiny, tokenizer, long + CORPUS, 0)


def test_a_given_model_is_taken_as_it_is():
    config = Config(model=ModelConfig(path="some/model"))
    assert resolve_base(config) == "some/model"


@pytest.fixture
def corpora(monkeypatch):
    """The arguments of `build_base`, which builds nothing."""
    seen = []

    def record(config, tokenizer, corpus, seed):
        seen.append(corpus)

    monkeypatch.setattr(base_model, "build_base", record)
    return seen


def test_the_testbed_base_never_sees_held_out_problems(corpora):
    config = Config(
        data=DataConfig(num_eval=32), testbed=TestbedConfig(num_train=8, min_steps=1), base=TINY
    )
    resolve_base(config)
    _, held_out = make_rows(config.testbed, 32, config.seed)
    assert len(corpora[0]) == TINY.num_batches * TINY.batch_size
    prompts = {prompt for prompt, _ in corpora[0]}
    for row in held_out:
        assert not any(row["prompt"] in prompt for prompt in prompts)


def test_a_base_of_other_data_learns_its_training_demonstrations(corpora, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"Is it {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(12)]
    rows[3]["answer"] = "no idea"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = DataConfig(path=str(path), num_eval=4, demonstration_fraction=0.5)
    config = Config(data=data, base=TINY)
    resolve_base(config)
    expected = [i for i in range(8) if i != 3]
    assert corpora[0] == [
        (f"<|user|>Is it {i}?<|assistant|>", f"It is {i}.\n#### {i}") for i in expected
    ]
