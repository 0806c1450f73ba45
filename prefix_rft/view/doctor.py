"""What is installed, what a run will use of it and why, and the memory it needs."""

import os
import platform
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefix_rft.config import Config
from prefix_rft.loading import resolve_autocast_dtype, resolve_device
from prefix_rft.view.memory import memory_terms, peak_bytes, shapes_of

MODULES = ("torch", "triton", "transformers", "datasets", "math_verify")
# module -> (extra, what a run does with it)
EXTRAS = {
    "vllm": ("vllm", "serves rollout.engine vllm"),
    "flash_attn": ("flash-attn", "attention of packed rows on CUDA, without padding"),
    "liger_kernel": ("liger", "not used by this version"),
    "wandb": ("wandb", "serves log.wandb_project"),
}


def print_diagnosis(config: Config, *, with_memory: bool) -> None:
    """Print versions, devices, choices and, with_memory, the estimate of `memory_terms`.

    Raises:
        ConfigError: a device that is not there, or a model whose configuration cannot be read.
    """
    console = Console(highlight=False)
    device = resolve_device(config.model)
    console.print(_table("Versions", ("package", "version", "note"), version_rows()))
    console.print(_table("Devices", ("device", "memory", "note"), device_rows()))
    console.print(_table("A run uses", ("part", "choice", "because"), choice_rows(config, device)))
    if with_memory:
        checkpointing = config.model.gradient_checkpointing
        terms = memory_terms(shapes_of(config), gradient_checkpointing=checkpointing)
        rows = [(term.name, _size(term.num_bytes), term.formula) for term in terms]
        peak, available = peak_bytes(terms), device_bytes(device)
        verdict = "fits into" if peak <= available else "does not fit into"
        sum_ = "what always stays + the larger of update and rollout"
        rows.append(("peak", _size(peak), f"{sum_}; {verdict} {_size(available)}"))
        console.print(_table(f"Memory of {config.name}", ("term", "estimate", "formula"), rows))


def version_rows() -> list[tuple[str, str, str]]:
    """(module, version, note); nothing is imported, and rebuilds under another name are found."""
    distributions = packages_distributions()

    def installed(module: str) -> str | None:
        names = distributions.get(module) if find_spec(module) else None
        return ", ".join(sorted({version(name) for name in names})) if names else None

    rows = [("python", platform.python_version(), platform.platform())]
    rows += [(module, installed(module) or "not installed", "") for module in MODULES]
    for module, (extra, use) in EXTRAS.items():
        found = installed(module)
        note = use if found else f"{use}; pip install 'prefix-rft[{extra}]'"
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
    """The memory of `device`; for a CPU that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choice_rows(config: Config, device: torch.device) -> list[tuple[str, str, str]]:
    """(part, choice, because) of what the `auto` fields of `config` come to on `device`."""
    asked = config.model.device
    rows = [("device", str(device), "the best one here" if asked == "auto" else "model.device")]
    autocast = resolve_autocast_dtype(config.model)
    compute = str(autocast or config.model.dtype).removeprefix("torch.")
    weights = "float64" if config.model.dtype == "float64" else "float32"
    rows.append(
        (
            "dtype",
            "float32" if compute == "auto" else compute,
            f"of the forward; weights and optimizer state are {weights}",
        )
    )
    rows.append(("kernels", *_kernel_choice(device)))
    rows.append(("attention", *_attention_choice(config, device)))
    rows.append(("rollouts", config.rollout.engine, "rollout.engine"))
    return rows


def _kernel_choice(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "torch", "chunked torch; Triton kernels need CUDA"
    if find_spec("triton") is None:
        return "torch", "triton is not installed"
    return "triton", "a CUDA device"


def _attention_choice(config: Config, device: torch.device) -> tuple[str, str]:
    if config.model.attention != "auto":
        return config.model.attention, "model.attention"
    if device.type != "cuda":
        return "sdpa", "flash-attn needs CUDA"
    if find_spec("flash_attn") is None:
        return "sdpa", "flash-attn is not installed"
    return "flash_attention_2", "flash-attn is installed"


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.1f} MiB"
