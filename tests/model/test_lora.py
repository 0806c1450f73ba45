"""Adapters: what they train, their gradient, and the merged model that is exported."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rft_kernels import LMHead, PolicyConfig
from transformers import AutoModelForCausalLM

from prefix_rft.checks import ConfigError
from prefix_rft.config import packages
from prefix_rft.config.sections import ModelConfig, ShardingConfig
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.model.distributed import World
from prefix_rft.model.loading import export, host_config, load_model, resolve_weight_dtypes
from prefix_rft.model.lora import is_adapter
from prefix_rft.model.policy import Policy
from prefix_rft.model.weights import full_weights, weight_shapes
from prefix_rft.train.checkpoint import list_checkpoints
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.run import Setup, export_checkpoint, train
from tests.model.rank_worker import given
from tests.model.test_distributed import output_of, step_on_ranks, train_on_ranks
from tests.model.test_model import VOCAB, make_batch
from tests.tiny import make_run

pytest.importorskip("peft")

LORA = {"lora_rank": 3, "lora_alpha": 6.0}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def saved(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(path, *, seed: int = 0, **fields):
    """The model at `path` with adapters that change its outputs."""
    config = ModelConfig(path=str(path), device="cpu", **(LORA | {"dtype": "float64"} | fields))
    model = load_model(config, path, seed=seed)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def merged_by_hand(model, name: str) -> torch.Tensor:
    """W + (alpha / rank) B A of a linear layer."""
    state = model.state_dict()
    stem = name.removesuffix(".weight")
    product = state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
    return state[f"{stem}.base_layer.weight"].to(product.dtype) + 6.0 / 3 * product


def test_only_adapters_of_the_body_are_trained_in_full_precision(saved) -> None:
    model = adapted(saved, dtype="bfloat16")
    policy = Policy(model, temperature=1.0, vocab_size=VOCAB, autocast_dtype=torch.bfloat16)
    assert type(policy.lm_head) is LMHead
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert len(trained) == 2 * 2 * len(LINEAR)  # A and B, 2 layers
    assert all(is_adapter(name) and p.dtype == torch.float32 for name, p in trained.items())
    assert not any(is_adapter(name) for name in frozen)
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert all(any(part in name for part in LINEAR) for name in trained)


def test_new_adapters_change_nothing_and_follow_from_the_seed(saved) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = load_model(ModelConfig(device="cpu", dtype="float64"), saved)(ids).logits
    config = ModelConfig(device="cpu", dtype="float64", **LORA)
    models = [load_model(config, saved, seed=seed) for seed in (1, 1, 2)]
    assert all(torch.equal(model(ids).logits, plain) for model in models)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    first, same, other = (model.state_dict()[name] for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_gradients_are_the_chain_rule_on_those_of_the_merged_weights(saved, tmp_path) -> None:
    """dB = s dW A^T and dA = s B^T dW, where dW is the gradient without adapters."""
    batch, loss = make_batch(), {"normalizer": 100.0, "loss": PolicyConfig()}
    model = adapted(saved)
    merged = load_model(ModelConfig(device="cpu", dtype="float64"), saved)
    merged.load_state_dict(dict(full_weights(model, dtype=torch.float64, bucket_bytes=10**9)))
    for each in (model, merged):
        policy = Policy(each, temperature=1.0, vocab_size=VOCAB)
        policy.loss(batch, **loss).loss.backward()
    named = dict(model.named_parameters())
    for name, weight in merged.named_parameters():
        if not any(part in name and "weight" in name for part in LINEAR):
            continue
        stem = name.removesuffix(".weight")
        down, up = (named[f"{stem}.lora_{x}.default.weight"] for x in "AB")
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(up.grad, 2.0 * weight.grad @ down.T)
        torch.testing.assert_close(down.grad, 2.0 * up.T @ weight.grad)


@pytest.mark.parametrize("unties", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_announce_the_weights_that_come(make_model, tmp_path, tied, unties) -> None:
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    options = {"dtype": torch.bfloat16, "vocab_size": VOCAB, "unties": unties}
    announced = weight_shapes(model, **options)
    come = full_weights(model, bucket_bytes=10**4, **options)
    assert announced == [(name, weight.dtype, tuple(weight.shape)) for name, weight in come]
    shapes = {name: shape for name, _, shape in announced}
    assert shapes["model.embed_tokens.weight"][0] == VOCAB
    assert ("lm_head.weight" in shapes) == (unties or not tied)


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_is_the_ordinary_model_with_the_same_outputs(
    make_model, tiny_tokenizer, tmp_path, tied
) -> None:
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    export(model, tiny_tokenizer, tmp_path / "out")
    assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float64 and not hasattr(loaded, "peft_config")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-10, atol=1e-10)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert (base(ids).logits - loaded(ids).logits).abs().max() > 0.1


def test_adapters_of_frozen_bfloat16_weights_are_exported_unrounded(
    saved, tiny_tokenizer, tmp_path
) -> None:
    model = adapted(saved, dtype="bfloat16")
    export(model, tiny_tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(loaded.state_dict()[name], merged_by_hand(model, name))


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 10**9])
def test_full_weights_have_the_names_of_the_plain_model(saved, bucket_bytes) -> None:
    model = adapted(saved)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    options = {"dtype": torch.bfloat16, "bucket_bytes": bucket_bytes, "vocab_size": VOCAB}
    weights = dict(full_weights(model, **options))
    assert list(weights) == list(plain.state_dict())
    for name, weight in weights.items():
        is_linear = any(f"{part}.weight" in name for part in LINEAR)
        whole = merged_by_hand(model, name) if is_linear else plain.state_dict()[name]
        rows = VOCAB if name in ("lm_head.weight", "model.embed_tokens.weight") else len(whole)
        assert torch.equal(weight, whole[:rows].bfloat16()), name


def test_a_tied_weight_comes_once_or_under_each_name(make_model) -> None:
    model = make_model(tie_word_embeddings=True)
    options = {"dtype": torch.float32, "bucket_bytes": 10**9}
    assert "lm_head.weight" not in dict(full_weights(model, **options))
    weights = dict(full_weights(model, unties=True, **options))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_frozen_weights_wait_in_host_memory_as_their_device_will_want_them() -> None:
    config = ModelConfig(**LORA)
    expected = (torch.bfloat16, torch.float32)
    assert resolve_weight_dtypes(config, torch.device("cuda")) == expected
    assert resolve_weight_dtypes(host_config(config, torch.device("cuda"))) == expected
    assert resolve_weight_dtypes(host_config(config)) == (torch.float32, torch.float32)


def test_peft_that_is_not_there_is_one_clear_error(saved, monkeypatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.lora_rank: .* pip install '\.\[lora\]'"):
        adapted(saved)


def test_a_resumed_run_equals_an_uninterrupted_one_and_trains_the_body_alone(tmp_path) -> None:
    config = make_run(tmp_path, model=LORA, prefix_rft={"horizon_steps": 4})
    train(replace(config, trainer=replace(config.trainer, num_steps=2)))
    [checkpoint] = list_checkpoints(config.run_dir)
    kept = dcp.FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    kept = [name for name in kept if name.startswith("model.")]
    assert len(kept) == 2 * 2 * len(LINEAR) and all(map(is_adapter, kept))
    train(config, resume=True)
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    base, ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (config.model.path, config.run_dir / "model", whole.run_dir / "model")
    )
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
        is_linear = any(f"{part}.weight" in name for part in LINEAR)
        assert torch.equal(weight, base[name]) != is_linear, name


# Two ranks


@pytest.mark.slow
def test_one_step_of_two_ranks_equals_that_of_one_process(tmp_path) -> None:
    config = make_run(
        tmp_path,
        model=LORA | {"dtype": "float64", "gradient_checkpointing": True},
        optimizer={"lr": 1e-2, "eps": 1e-4},
    )
    alone = World()
    with Setup(replace(config, sharding=ShardingConfig()), config.model.path, alone) as setup:
        trainer = setup.trainer()
        groups = trainer.rollouts(StepMetrics(), Interrupt(alone))
        trainer.rollouts = given(groups)
        before = {n: w.clone() for n, w in setup.policy.model.named_parameters()}
        trainer.train_step(Interrupt(alone))
    result = step_on_ranks(config, groups, tmp_path)
    for name, weight in setup.policy.model.named_parameters():
        assert (result["weights"][name] - weight).abs().max() < 1e-9, name
        moved = (weight - before[name]).abs().max() > 1e-3
        assert moved == weight.requires_grad, name


@pytest.mark.slow
def test_two_ranks_of_bfloat16_export_what_one_process_makes_of_their_checkpoint(tmp_path) -> None:
    config = make_run(tmp_path, model=LORA | {"dtype": "bfloat16"}, optimizer={"lr": 1e-2})
    config = replace(config, trainer=replace(config.trainer, num_steps=2))
    output_of(train_on_ranks(config, tmp_path))
    assert len(list_checkpoints(config.run_dir)) == 1
    export_checkpoint(config.run_dir, None, tmp_path / "alone")
    base, ours, alone = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (config.model.path, config.run_dir / "model", tmp_path / "alone")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert (ours[name] - base[name].bfloat16().float()).abs().max() > 1e-3
    for name, weight in ours.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-6)
