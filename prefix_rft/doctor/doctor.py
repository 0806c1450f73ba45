"""What is installed, what a run will use of it and why, and how much memory it needs."""

import os
import platform
from importlib.metadata import packages_distributions, version

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig

from prefix_rft.checks import ConfigError
from prefix_rft.config import EXTRAS, Config, install_hint, is_installed, model_at
from prefix_rft.doctor.memory import UNCOUNTED_FRACTION, memory_terms, peak_bytes, shortfalls
from prefix_rft.doctor.shapes import Place, shapes_of
from prefix_rft.model import (
    load_tokenizer,
    resolve_autocast_dtype,
    resolve_device,
    resolve_weight_dtypes,
    stop_token_ids,
)

MODULES = ("torch", "triton", "transformers", "datasets", "math_verify")
# What each optional module is for.
USES = {
    "vllm": "needed by rollout.engine vllm and vllm_server",
    "flash_attn": "attention of packed rows on CUDA, without padding",
    "liger_kernel": "needed by model.liger",
    "peft": "needed by model.lora_rank",
    "torchao": 'needed by optimizer.name = "adamw_8bit"',
    "wandb": "needed by log.wandb_project",
}


def print_diagnosis(config: Config) -> None:
    """Print versions, devices and choices.

    Raises:
        ConfigError: the machine has no such device.
    """
    device = resolve_device(config.model)
    _print("Versions", ("package", "version", "note"), version_rows())
    _print("Devices", ("device", "memory", "note"), device_rows())
    _print("A run on this machine uses", ("part", "choice", "because"), choice_rows(config, device))


def print_memory(config: Config, *, num_processes: int, device_gib: float | None) -> None:
    """Print the memory plan of one process, and whether it fits.

    Args:
        num_processes: processes of the run.
        device_gib: memory of a CUDA device, which this machine need not have; None: plan for the
            device of `config` on this machine.
    Raises:
        ConfigError: the sizes of the model cannot be read, or the number of processes does not
            suit the configuration.
    """
    divisors = {"sharding.replicas": config.sharding.replicas}
    if config.rollout.engine == "vllm":
        divisors["vllm.tensor_parallel_size"] = config.vllm.tensor_parallel_size
    for key, value in divisors.items():
        if num_processes % value:
            raise ConfigError(
                f"{key}: expected a divisor of the {num_processes} processes, got {value}"
            )
    if device_gib is None:
        device = resolve_device(config.model)
        size = device_bytes(device)
        if device.type == "cpu":
            size //= num_processes  # they share the machine
        place = Place(device=device, device_bytes=size, num_processes=num_processes)
    else:
        size = int(device_gib * 2**30)
        place = Place(device=torch.device("cuda"), device_bytes=size, num_processes=num_processes)
    shapes = shapes_of(config, place)
    terms = memory_terms(config, shapes, place)
    rows = [(term.name, term.phase, _size(term.num_bytes), term.formula) for term in terms]
    for phase in ("update", "rollout", "host"):
        formula = "host memory" if phase == "host" else f"always + {phase}"
        rows.append(("sum", phase, _size(peak_bytes(terms, phase)), formula))
    plan = f"planned for {place.device} and {_compute_dtype(config, place.device)}"
    title = f"Memory of {config.name}, {plan}, one process of {num_processes} ({shapes.source})"
    _print(title, ("term", "when", "estimate", "formula"), rows)
    reasons = shortfalls(config, shapes, place, terms)
    verdict = f"does not fit: {'; '.join(reasons)}" if reasons else "fits"
    _console().print(
        f"Device of {_size(place.device_bytes)}, {UNCOUNTED_FRACTION:.0%} of it reserved for what "
        f"no term counts: {verdict}."
    )


def version_rows() -> list[tuple[str, str, str]]:
    """(module, version, note); imports nothing, and finds rebuilds under another name."""
    distributions = packages_distributions()

    def installed(module: str) -> str | None:
        names = distributions.get(module) if is_installed(module) else None
        return ", ".join(sorted({version(name) for name in names})) if names else None

    rows = [("python", platform.python_version(), platform.platform())]
    rows += [(module, installed(module) or "not installed", "") for module in MODULES]
    for module, use in USES.items():
        found = installed(module)
        note = use if found else f"{use}; {install_hint(EXTRAS[module])}"
        rows.append((module, found or "not installed", note))
    return rows


def device_rows() -> list[tuple[str, str, str]]:
    cpu = torch.device("cpu")
    rows = [("cpu", _size(device_bytes(cpu)), f"{os.cpu_count()} cores")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = _size(properties.total_memory)
        note = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        rows.append((f"cuda:{index}", memory, note))
    return rows


def device_bytes(device: torch.device) -> int:
    """Memory of `device`; of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choice_rows(config: Config, device: torch.device) -> list[tuple[str, str, str]]:
    """(part, choice, because): how the `auto` fields of `config` resolve on `device`."""
    asked = config.model.device
    rows = [("device", str(device), "the best available" if asked == "auto" else "model.device")]
    weights = "float64" if config.model.dtype == "float64" else "float32"
    rows.append(
        (
            "dtype",
            _compute_dtype(config, device),
            f"for the forward; weights and optimizer state are {weights}",
        )
    )
    rows.append(("kernels", *_kernel_choice(device)))
    rows.append(("attention", *_attention_choice(config, device)))
    engine = config.rollout.engine
    needs_vllm = engine.startswith("vllm")
    why = _why_needed("rollout.engine", "vllm") if needs_vllm else "rollout.engine"
    rows.append(("rollouts", engine, why))
    rows.append(("ends of a response", *_ends_of_response(config)))
    if (rank := config.model.lora_rank) is not None:
        rows.append(("adapters", f"rank {rank}", _why_needed("model.lora_rank", "peft")))
    return rows


def _ends_of_response(config: Config) -> tuple[str, str]:
    """The tokens and texts that end one, and what names them; never asks the hub."""
    if config.model.path is None:
        return "the end token", "section [base]"
    path = model_at(config.model.path)
    try:
        tokenizer = load_tokenizer(path, config.model.chat_template, local_files_only=True)
    except ConfigError:
        return "unknown", f"the tokenizer of {path} is not on this machine"
    try:
        generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        generation_config = None  # it need not have one
    ids = stop_token_ids(tokenizer, generation_config, config.rollout.stop_token_ids)
    ends = [
        f"{token} ({i})" for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]
    why = "chat template, tokenizer, generation config, rollout.stop_token_ids, rollout.stop"
    return ", ".join([*ends, *map(repr, config.rollout.stop)]), why


def _compute_dtype(config: Config, device: torch.device) -> str:
    """Name of the dtype of the forward on `device`."""
    _, trained = resolve_weight_dtypes(config.model, device)
    return str(resolve_autocast_dtype(config.model, device) or trained).removeprefix("torch.")


def _why_needed(key: str, module: str) -> str:
    """The key that needs `module`, and how to install `module` if it is missing."""
    if is_installed(module):
        return key
    return f"{key}; but {module} is not installed: {install_hint(EXTRAS[module])}"


def _kernel_choice(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "torch", "chunked torch; Triton kernels need CUDA"
    if not is_installed("triton"):
        return "torch", "triton is not installed"
    return "triton", "a CUDA device"


def _attention_choice(config: Config, device: torch.device) -> tuple[str, str]:
    if config.model.attention != "auto":
        return config.model.attention, "model.attention"
    if device.type != "cuda":
        return "sdpa", "flash-attn needs CUDA"
    if not is_installed("flash_attn"):
        return "sdpa", "flash-attn is not installed"
    return "flash_attention_2", "flash-attn is installed"


def _console() -> Console:
    return Console(highlight=False)


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.1f} MiB"
