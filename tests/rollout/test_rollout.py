"""The transformers engine against forwards without a cache and the trainer's log-probs."""

import copy
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.data_types import RolloutRequest
from prefix_rft.model.attention import LEAN_SDPA
from prefix_rft.model.policy import Policy
from prefix_rft.rollout.make_engine import make_engine as make_configured
from prefix_rft.rollout.stop_text import StopText
from prefix_rft.rollout.transformers_engine import TransformersEngine
from tests.rollout.rollout_cases import VOCAB, generate, greedy_alone, log_prob_gap, make_requests


def make_engine(model, *, eos=(1,), max_batch_sequences=64, **options) -> TransformersEngine:
    return TransformersEngine(
        model,
        eos_token_ids=eos,
        pad_token_id=0,
        vocab_size=options.pop("vocab_size", VOCAB),
        max_batch_sequences=max_batch_sequences,
        **options,
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_the_trainer(tiny_model, temperature):
    policy = Policy(tiny_model, temperature=temperature, vocab_size=VOCAB)
    requests = make_requests(24)
    completions = generate(make_engine(tiny_model), requests, temperature=temperature)
    assert log_prob_gap(policy, requests, completions) < 1e-5


def test_log_probs_are_exact_in_float64(make_model):
    model = make_model(dtype=torch.float64)
    policy = Policy(model, temperature=0.7, vocab_size=VOCAB)
    requests = make_requests(6)
    completions = generate(make_engine(model), requests, temperature=0.7)
    assert log_prob_gap(policy, requests, completions, dtype=torch.float64) < 1e-6


def test_log_probs_agree_in_bfloat16(tiny_model):
    policy = Policy(tiny_model, temperature=1.0, vocab_size=VOCAB, autocast_dtype=torch.bfloat16)
    engine = make_engine(tiny_model, autocast_dtype=torch.bfloat16)
    requests = make_requests(24)
    completions = generate(engine, requests)
    assert 1e-4 < log_prob_gap(policy, requests, completions) < 0.3  # logits reach 10


@pytest.mark.parametrize("attention", ["sdpa", "eager", LEAN_SDPA])
@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma2"])
def test_greedy_equals_the_loop_without_cache(make_model, model_type, attention):
    window = {"sliding_window": 6} if model_type == "gemma2" else {}
    model = make_model(model_type, attention=attention, **window).eval()
    # One token in twelve ends a completion, so that rows finish at different times.
    eos = tuple(range(0, VOCAB, 12))
    requests = make_requests(24)
    completions = generate(make_engine(model, eos=eos), requests, temperature=0.0)
    expected = [greedy_alone(model, request, eos=eos) for request in requests]
    assert [completion.token_ids for completion in completions] == expected
    for request, completion in zip(requests, completions, strict=True):
        stopped = completion.token_ids[-1] in eos
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == request.max_new_tokens
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


@pytest.mark.parametrize("max_batch_sequences", [3, 64])
def test_texts_end_completions_as_if_cut_afterwards(
    tiny_model, tiny_tokenizer, max_batch_sequences
):
    requests = make_requests(24)
    whole = generate(make_engine(tiny_model), requests, temperature=0.0)
    texts = [tiny_tokenizer.decode(completion.token_ids) for completion in whole]
    stop = [max(texts, key=len)[2:4], texts[2][-1:]]
    stop_text = StopText(tiny_tokenizer, stop)
    engine = make_engine(tiny_model, stop_text=stop_text, max_batch_sequences=max_batch_sequences)
    completions = generate(engine, requests, temperature=0.0)
    num_cut = 0
    for completion, before, text in zip(completions, whole, texts, strict=True):
        ends = [text.find(each) + len(each) for each in stop if each in text]
        widths = [len(tiny_tokenizer.decode([token])) for token in before.token_ids]
        count = len(widths)
        if ends:
            count = 1 + sum(total < min(ends) for total in accumulate(widths))
        assert completion.token_ids == before.token_ids[:count]
        assert len(completion.log_probs) == count
        assert completion.finish_reason == ("stop" if ends else before.finish_reason)
        num_cut += count < len(before.token_ids)
    assert num_cut > 3 and stop_text.cut(completions[0]) == completions[0]


def test_without_ends_each_completion_has_its_full_length(tiny_model, tiny_tokenizer):
    requests = make_requests(24)
    stop_text = StopText(tiny_tokenizer, ["a", "e"])
    engine = make_engine(tiny_model, eos=range(0, 100, 12), stop_text=stop_text)
    ended = generate(engine, requests)
    assert sum(completion.finish_reason == "stop" for completion in ended) > 3
    engine.ignore_ends()
    budgets = [request.max_new_tokens for request in requests]
    assert [len(completion.token_ids) for completion in generate(engine, requests)] == budgets


def test_a_text_that_ends_all_completions_ends_generation(tiny_model, tiny_tokenizer, monkeypatch):
    request = RolloutRequest(prompt_ids=(5, 6), max_new_tokens=200)
    (whole,) = generate(make_engine(tiny_model, eos=(VOCAB,)), [request], temperature=0.0)
    forward, calls = tiny_model.forward, []
    monkeypatch.setattr(tiny_model, "forward", lambda *a, **o: calls.append(1) or forward(*a, **o))
    stop_text = StopText(tiny_tokenizer, [tiny_tokenizer.decode(whole.token_ids[3:6])])
    engine = make_engine(tiny_model, eos=(VOCAB,), stop_text=stop_text)
    (completion,) = generate(engine, [request], temperature=0.0)
    assert completion.token_ids == whole.token_ids[:6] and completion.finish_reason == "stop"
    assert len(calls) == 6


def test_a_run_stops_at_the_end_of_the_turn_and_where_it_is_told(tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    policy = Policy(tiny_model, temperature=1.0, vocab_size=VOCAB)
    requests = [RolloutRequest(prompt_ids=(i, 6), max_new_tokens=60) for i in range(3, 30)]

    def last_ids(**rollout: object) -> set[int]:
        config = config_from_dict({"rollout": rollout})
        completions = generate(make_configured(config, policy, tokenizer), requests)
        assert {c.finish_reason for c in completions} <= {"stop", "length"}
        return {c.token_ids[-1] for c in completions if c.finish_reason == "stop"}

    assert last_ids() <= {1}
    tokenizer.chat_template = "{{ messages[-1].content }}{{ '<unk>' }}"
    assert last_ids() >= {2} and last_ids() <= {1, 2}
    assert last_ids(stop_token_ids=[9], stop=["x"]) >= {2, 9, tokenizer.get_vocab()["x"]}
    with pytest.raises(
        ConfigError, match="rollout.stop_token_ids: expected ids below 100, got 100"
    ):
        last_ids(stop_token_ids=[3, 100])


def test_greedy_log_probs_are_at_temperature_one(tiny_model):
    policy = Policy(tiny_model, temperature=1.0, vocab_size=VOCAB)
    requests = make_requests(6)
    completions = generate(make_engine(tiny_model), requests, temperature=0.0)
    assert log_prob_gap(policy, requests, completions) < 1e-5


def test_long_prefixes_of_all_rows(tiny_model):
    """If every row has a prefix, the common width is prefilled and the rest is fed step by step."""
    requests = [
        RolloutRequest(prompt_ids=(5, 6), prefix_ids=(7, 8, 9) * (3 + i), max_new_tokens=20 - 3 * i)
        for i in range(4)
    ]
    tiny_model.eval()
    completions = generate(make_engine(tiny_model), requests, temperature=0.0)
    expected = [greedy_alone(tiny_model, request) for request in requests]
    assert [completion.token_ids for completion in completions] == expected


def test_long_completions_outgrow_the_first_cache(tiny_model):
    requests = [RolloutRequest(prompt_ids=(i, 5), max_new_tokens=220 - i) for i in range(3, 6)]
    tiny_model.eval()
    completions = generate(make_engine(tiny_model, eos=(VOCAB,)), requests, temperature=0.0)
    expected = [greedy_alone(tiny_model, request, eos=(VOCAB,)) for request in requests]
    assert [completion.token_ids for completion in completions] == expected
    assert [len(tokens) for tokens in expected] == [217, 216, 215]


def test_tokens_follow_the_distribution(tiny_model):
    temperature, num_draws = 1.3, 4000
    prompt = (5, 17, 30)
    request = RolloutRequest(prompt_ids=prompt, max_new_tokens=1)
    completions = generate(
        make_engine(tiny_model, max_batch_sequences=num_draws),
        [request] * num_draws,
        temperature=temperature,
    )
    logits = tiny_model(input_ids=torch.tensor([prompt])).logits[0, -1, :VOCAB].detach()
    expected = torch.softmax(logits / temperature, dim=-1) * num_draws
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCAB)
    often = expected > 5
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    degrees = int(often.sum())
    assert degrees > 10
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_ids_past_the_tokenizer_are_never_sampled(make_model):
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 20  # would nearly always win
    policy = Policy(model, temperature=1.0, vocab_size=VOCAB)
    requests = make_requests(16)
    unmasked = generate(make_engine(model, vocab_size=112), requests)
    assert any(max(c.token_ids) >= VOCAB for c in unmasked)
    completions = generate(make_engine(model), requests)
    assert all(max(c.token_ids) < VOCAB for c in completions)
    assert log_prob_gap(policy, requests, completions) < 1e-5


def test_a_seed_gives_the_same_tokens_bit_for_bit(tiny_model):
    engine, requests = make_engine(tiny_model, max_batch_sequences=7), make_requests(24)
    first = generate(engine, requests, seed=2**40)
    assert generate(engine, requests, seed=2**40) == first
    assert generate(engine, requests, seed=2**40 + 1) != first


def test_batches_do_not_change_greedy_completions(tiny_model):
    requests = make_requests(24)
    whole = generate(make_engine(tiny_model), requests, temperature=0.0)
    parts = generate(make_engine(tiny_model, max_batch_sequences=5), requests, temperature=0.0)
    assert [c.token_ids for c in parts] == [c.token_ids for c in whole]


def test_training_goes_on_around_generation(make_model):
    """In training mode with gradient checkpointing the cache works, and the mode is restored."""
    model, requests = make_model(), make_requests(12)
    expected = generate(make_engine(model), requests)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert generate(make_engine(model), requests) == expected
    assert model.training and all(module.training for module in model.modules())
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_interrupt_leaves_the_engine_usable(tiny_model, monkeypatch):
    engine, requests = make_engine(tiny_model.train()), make_requests(12)
    expected = generate(engine, requests)
    forward, calls = tiny_model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(engine, requests)
    assert tiny_model.training
    assert generate(engine, requests) == expected


def test_new_weights_are_used_at_their_version(make_model):
    model, requests = make_model(), make_requests(6)
    engine = make_engine(model)
    before = generate(engine, requests)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    engine.update_weights(model, 1)
    with pytest.raises(RuntimeError, match="asked for version 0, the engine holds version 1"):
        generate(engine, requests)
    assert generate(engine, requests, weights_version=1) != before
    engine.update_weights(make_model(), 2)
    assert generate(engine, requests, weights_version=2) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, r"requests\[1\].prompt_ids: expected at least one token"),
        ({"max_new_tokens": 0}, r"requests\[1\].max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": -3}, r"requests\[1\].max_new_tokens: expected at least 1, got -3"),
        ({"max_new_tokens": 255}, r"requests\[1\]: expected at most 256 tokens"),
        ({"prefix_ids": (5,) * 250}, r"requests\[1\]: .* got 2 of prompt \+ 250 of prefix"),
    ],
)
def test_bad_requests_are_refused(tiny_model, change, message):
    good = RolloutRequest(prompt_ids=(5, 6), max_new_tokens=5)
    with pytest.raises(ValueError, match=message):
        generate(make_engine(tiny_model), [good, replace(good, **change)])


def test_bad_arguments_are_refused(tiny_model):
    with pytest.raises(ValueError, match="temperature: expected at least 0, got -1"):
        generate(make_engine(tiny_model), make_requests(1), temperature=-1.0)
    with pytest.raises(ValueError, match="vocab_size: expected 1 to 112, got 113"):
        make_engine(tiny_model, vocab_size=113)
    with pytest.raises(ValueError, match="eos_token_ids: expected at least one id"):
        make_engine(tiny_model, eos=())
    with pytest.raises(ValueError, match="max_batch_sequences: expected at least 1, got 0"):
        make_engine(tiny_model, max_batch_sequences=0)


def test_no_requests_no_completions(tiny_model):
    assert generate(make_engine(tiny_model), []) == []


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
def test_what_a_group_shares_is_read_once(make_model, monkeypatch, model_type) -> None:
    """The prefill of groups, each with a hybrid, has a row for each distinct start."""
    window = {"sliding_window": 6} if model_type == "gemma2" else {}
    model = make_model(model_type, dtype=torch.float64, **window).eval()
    prompts = [(5, 6, 7, 8, 9), (5, 6, 7, 8, 10), (11, 12)]
    requests = [
        RolloutRequest(prompt_ids=prompt, prefix_ids=prefix, max_new_tokens=12 - len(prefix))
        for prompt in prompts
        for prefix in ((), (), (), (20, 21, 22))
    ]
    forward, rows = model.forward, []

    def spied(*args, **options):
        rows.append(len(options["input_ids"]))
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", spied)
    completions = generate(make_engine(model), requests, temperature=0.9)
    monkeypatch.undo()
    assert rows[0] == 3 + 1 and rows[1] == 12  # the third prompt with its prefix fits the width
    policy = Policy(model, temperature=0.9, vocab_size=VOCAB)
    assert log_prob_gap(policy, requests, completions, dtype=torch.float64) < 1e-9
    tokens = [completion.token_ids for completion in completions]
    assert len(set(tokens)) > 6  # the rows of a group are drawn apart
