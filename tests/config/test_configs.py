"""The configurations shipped for the paper's runs: its setting, and the memory they promise."""

import json
import re
from importlib import resources

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prefix_rft.cli import parse
from prefix_rft.config import load_config
from prefix_rft.doctor.memory import memory_terms, peak_bytes, shortfalls
from prefix_rft.doctor.shapes import Place, shapes_of

SFT = "qwen2.5-math-7b-sft"
SMALL = {"testbed", "testbed-methods", "testbed-methods-gpu", "gsm8k", "smollm2-gsm8k"}
SHIPPED = {
    file.name.removesuffix(".toml"): file.read_text()
    for file in (resources.files("prefix_rft") / "configs").iterdir()
}
PAPER = sorted(SHIPPED.keys() - SMALL)
# What cards sold as 80 and 24 GB have at the least, in GiB.
REAL_GIB = {80: 79, 24: 22}


def promised(name: str) -> tuple[int, int]:
    """(processes, GiB of each) that the name of a configuration stands for."""
    found = re.search(r"-(\d)gpu-(\d+)gb$", name)
    return (int(found[1]), int(found[2])) if found else (8, 80)


def misfits(arguments: list[str], num_processes: int, gib: float) -> tuple[list[str], int]:
    """Why a run does not fit, and the host memory that it takes."""
    config = parse(["doctor", *arguments]).overrides
    place = Place(
        device=torch.device("cuda"), device_bytes=int(gib * 2**30), num_processes=num_processes
    )
    shapes = shapes_of(config, place)
    terms = memory_terms(config, shapes, place)
    return shortfalls(config, shapes, place, terms), peak_bytes(terms, "host")


def test_there_is_one_for_each_model_and_for_single_gpus_of_both_sizes() -> None:
    models = {load_config(name).model.path for name in PAPER}
    assert models == {
        "Qwen/Qwen2.5-Math-7B",
        "Qwen/Qwen2.5-Math-1.5B",
        "meta-llama/Llama-3.1-8B",
    }
    assert {promised(name) for name in PAPER} == {(8, 80), (1, 80), (1, 24)}


@pytest.mark.parametrize("name", PAPER)
def test_data_model_and_rollouts_are_the_published_ones(name) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.data.path == "Elliott/Openr1-Math-46k-8192"
    assert config.data.max_prompt_tokens == 1024
    is_qwen = "Qwen" in config.model.path
    assert (config.model.rope_theta, config.model.max_position_embeddings) == (
        (40_000, 16_384) if is_qwen else (None, None)
    )
    rollout = config.rollout
    assert rollout.engine == "vllm" and rollout.group_size == 8
    assert (rollout.temperature, rollout.max_response_length) == (1.0, 8192)


@pytest.mark.parametrize("name", sorted(set(PAPER) - {SFT}))
def test_the_method_is_the_published_one(name) -> None:
    config = load_config(name)
    model, optimizer, trainer = config.model, config.optimizer, config.trainer
    assert optimizer.lr == (1e-6 if model.lora_rank is None else 1e-5)
    assert (optimizer.name, optimizer.schedule, optimizer.warmup_steps) == ("adamw", "constant", 0)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.01, 1.0)
    assert (trainer.num_steps, trainer.prompts_per_step, trainer.prompts_per_update) == (
        500,
        128,
        64,
    )
    assert config.method.name == "prefix_rft"
    method = config.prefix_rft
    assert (method.num_hybrid, method.schedule, method.horizon_steps) == (1, "cosine_window", 500)
    assert (method.low, method.high, method.advantage) == (0.05, 0.95, "joint")
    assert (method.selection_fraction, method.selection_order) == (0.2, "high")
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)
    assert config.loss.entropy_coef == 0.0


def test_sft_follows_the_published_recipe() -> None:
    config = load_config(SFT)
    optimizer, trainer = config.optimizer, config.trainer
    assert (config.method.name, config.sft.epochs) == ("sft", 3)
    assert trainer.prompts_per_step == trainer.prompts_per_update == 64
    assert (optimizer.name, optimizer.lr, optimizer.schedule) == ("adamw", 5e-5, "cosine")
    assert (optimizer.warmup_fraction, optimizer.final_lr_fraction) == (0.1, 0.1)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.01)


@pytest.mark.parametrize("name", PAPER)
def test_the_chat_template_ends_where_the_demonstration_begins(name) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>")), bos_token="<s>"
    )
    tokenizer.chat_template = load_config(name).model.chat_template
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, **options)
    assert text.endswith("<think>\n") and text.count("<think>") == 1
    if "qwen" in name:
        assert text == (
            "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n"
        )
    else:
        assert text == "<s>System: Think.\n\nUser: 1 + 1?\n\nAssistant: <think>\n"


@pytest.mark.parametrize("name", PAPER)
def test_the_plan_fits_the_memory_that_the_name_promises(name) -> None:
    num_processes, gib = promised(name)
    assert misfits([name], num_processes, REAL_GIB[gib])[0] == []
    assert misfits([name], num_processes, gib / 10)[0] != []  # what fits is not just anything


@pytest.mark.parametrize("name", PAPER)
def test_commands_in_the_head_of_the_file_run_it_or_plan_it(name) -> None:
    head = "\n".join(line for line in SHIPPED[name].splitlines() if line.startswith("#"))
    assert f"train {name}" in head
    [command] = re.findall(r"prefix-rft (doctor .*)", head)
    options = parse(command.split())
    assert (options.num_processes, options.device_gib) == promised(name)


@pytest.mark.parametrize(
    ("gib", "options"),
    [
        (24, ["--sharding.cpu-offload", "--vllm.gpu-memory-utilization", "0.85"]),
        (
            80,
            ["--sharding.cpu-offload", "--model.lora-rank", "None", "--optimizer.lr", "1e-6"],
        ),
    ],
)
def test_the_variants_that_a_file_tells_of_fit_too(gib, options) -> None:
    name = "qwen2.5-math-7b-1gpu-80gb"
    head = re.sub(r"\s*#\s*", " ", SHIPPED[name])
    assert " ".join(options) in head
    reasons, host_bytes = misfits([name, *options], 1, REAL_GIB[gib])
    assert reasons == []
    [told] = re.findall(rf"(\d+) GiB of host memory: {re.escape(' '.join(options))}", head)
    assert int(told) - 1 < host_bytes / 2**30 <= int(told)


def test_what_the_hub_gives_is_not_asked_for(tmp_path, monkeypatch) -> None:
    """A model folder of another size at the same relative path goes before the shipped sizes."""
    folder = tmp_path / "Qwen" / "Qwen2.5-Math-7B"
    folder.mkdir(parents=True)
    sizes = {"model_type": "qwen2", "vocab_size": 10, "hidden_size": 64, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(sizes))
    monkeypatch.chdir(tmp_path)
    place = Place(device=torch.device("cpu"), device_bytes=2**30)
    shapes = shapes_of(load_config("qwen2.5-math-7b"), place)
    assert (shapes.layers, shapes.hidden) == (1, 64) and "shipped" not in shapes.source
