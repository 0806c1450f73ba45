"""Models that are built otherwise than Qwen2: trained, or refused in one line at the start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, config_from_dict
from prefix_rft.config.sections import ModelConfig
from prefix_rft.model.distributed import World
from prefix_rft.model.loading import load_model, load_policy, load_tokenizer
from prefix_rft.model.weights import full_weights
from prefix_rft.rollout import fit_lengths
from prefix_rft.train.run import evaluate_model, export_checkpoint, train
from tests.model.test_distributed import output_of, train_on_ranks
from tests.tiny import make_run, make_tokenizer

POSITIONS = 64
SIZES = {
    "vocab_size": len(make_tokenizer()),
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LAYERS: dict[str, dict[str, object]] = {
    "gpt2": {"num_hidden_layers": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "qwen2": {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48},
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
LORA = {"lora_rank": 3, "lora_alpha": 6.0}


def save(folder: Path, model_type: str) -> str:
    """A tiny model of that type, with random weights; a tokenizer that is there stays."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | LAYERS[model_type])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def run_of(folder: Path, model_type: str, **sections: dict) -> Config:
    config = make_run(
        folder,
        trainer={"num_steps": 2, "micro_batch_tokens": POSITIONS} | sections.pop("trainer", {}),
        **sections,
    )
    save(folder / "base", model_type)
    return config


@pytest.mark.parametrize("model", [{}, LORA])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "qwen3_moe"])
def test_a_run_trains_it_and_writes_it(tmp_path, model_type, model):
    config = run_of(tmp_path, model_type, model=model, optimizer={"lr": 1e-2})
    summary = train(config)
    assert summary["model_step"] == 2
    records = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    gaps = [record.get("rollout/log_prob_gap_mean") for record in records]
    gaps = [gap for gap in gaps if gap is not None]  # a step without an advantage has none
    assert gaps and max(gaps) < 1e-5
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "base", config.run_dir / "model")
    )
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved and all(after[name].shape == before[name].shape for name in after)
    if model:
        assert not any("wte" in name or "embed" in name or "experts" in name for name in moved)


def test_lora_on_a_conv1d_is_merged_as_it_computes(tmp_path):
    path = save(tmp_path, "gpt2")
    config = ModelConfig(device="cpu", dtype="float64", **LORA)
    model = load_model(config, path)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    plain = load_model(ModelConfig(device="cpu", dtype="float64"), path)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = plain(ids).logits
    plain.load_state_dict(
        dict(full_weights(model, dtype=torch.float64, bucket_bytes=1)), strict=False
    )
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-10, atol=1e-10)
    assert (before - plain(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("qwen2", None),
        ("gpt2", None),
        (
            "qwen3_moe",
            "no LoRA adapter, and so no training, for mlp.experts.down_proj, "
            "mlp.experts.gate_up_proj, mlp.gate (67% of the weights of the decoder layers)\n",
        ),
    ],
)
def test_what_lora_does_not_train_is_told(tmp_path, capsys, model_type, told):
    values = {"model": {"path": save(tmp_path, model_type), "device": "cpu"} | LORA}
    config = config_from_dict(values)
    load_policy(config, tmp_path, vocab_size=SIZES["vocab_size"], world=World())
    assert capsys.readouterr().out == (told or "")


def test_micro_batches_beyond_the_causal_mask_of_gpt_neo_are_refused(tmp_path):
    """Its packed rows are masked by their place in the whole micro-batch."""
    config = run_of(tmp_path, "gpt_neo", trainer={"micro_batch_tokens": POSITIONS + 1})
    with pytest.raises(ConfigError, match="micro_batch_tokens: expected at most 64, .* got 65"):
        train(config)
    assert not (config.run_dir / "summary.json").exists()
    results = evaluate_model(config, config.model.path)  # which has none
    assert results["num_problems"] == 4


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo"])
def test_learned_positions_cannot_be_extended(tmp_path, model_type):
    config = ModelConfig(device="cpu", max_position_embeddings=POSITIONS + 1)
    with pytest.raises(ConfigError, match=r"wpe.weight in shape \[64, 32\], .* needs \[65, 32\]"):
        load_model(config, save(tmp_path, model_type))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "awq", "fp8", "compressed-tensors"])
def test_quantized_weights_are_refused(tmp_path, method):
    path = Path(save(tmp_path, "qwen2")) / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"model.path: expected weights .* quantized \({method}"):
        load_model(ModelConfig(device="cpu"), tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "gpt_neo"])
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{}"},
        {"tokenizer_config.json": "[]"},
        {"tokenizer_config.json": '{"tokenizer_class": "X"}'},
    ],
)
def test_a_folder_without_tokenizer_is_one_clear_error(tmp_path, model_type, files):
    """For such a folder transformers makes up a tokenizer that knows no text."""
    save(tmp_path, model_type)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="model.path: expected a folder with a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("limit", "asked", "expected"),
    [
        (None, {}, (1024, 8192)),
        (9216, {}, (1024, 8192)),
        (8192, {}, (1024, 7168)),
        (1024, {}, (256, 768)),
        (8192, {"rollout": {"max_response_length": 8000}}, (192, 8000)),
        (8192, {"eval": {"max_response_length": 8000}}, (192, 8000)),
        (8192, {"data": {"max_prompt_tokens": 4000}}, (4000, 4192)),
    ],
)
def test_default_lengths_are_cut_to_the_model_for_evaluation(limit, asked, expected):
    config = config_from_dict(asked)
    fitting = fit_lengths(config, limit)
    assert (fitting.data.max_prompt_tokens, fitting.rollout.max_response_length) == expected
    assert fitting.eval == config.eval


def test_a_short_model_is_evaluated_and_what_was_set_is_refused(tmp_path, capsys):
    config = make_run(tmp_path)
    defaults = config_from_dict({})
    config = replace(
        config,
        data=replace(config.data, max_prompt_tokens=defaults.data.max_prompt_tokens),
        rollout=replace(config.rollout, max_response_length=defaults.rollout.max_response_length),
    )
    path = save(tmp_path / "base", "gpt2")
    assert evaluate_model(config, path)["num_problems"] == 4
    assert "max_prompt_tokens 16, rollout.max_response_length 48" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="rollout.max_response_length, .* at most the 64 tokens"):
        train(config)
    asked = replace(config, rollout=replace(config.rollout, max_response_length=80))
    with pytest.raises(ConfigError, match="rollout.max_response_length, .* at most the 64 tokens"):
        evaluate_model(asked, path)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, LORA])
def test_two_ranks_of_gpt2_export_what_one_process_makes_of_their_checkpoint(tmp_path, model):
    config = run_of(tmp_path, "gpt2", model=model, optimizer={"lr": 1e-2})
    output_of(train_on_ranks(config, tmp_path))
    export_checkpoint(config.run_dir, None, tmp_path / "alone")
    ours, alone, base = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (config.run_dir / "model", tmp_path / "alone", tmp_path / "base")
    )
    name = "transformer.h.0.mlp.c_fc.weight"
    assert (ours[name] - base[name]).abs().max() > 1e-3
    for name, weight in ours.items():
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-6)
