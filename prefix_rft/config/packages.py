"""The optional packages: whether one is installed, and how to install it."""

from importlib.util import find_spec

from prefix_rft.checks import ConfigError
from prefix_rft.config.config import Config

# The extra of setup.py that brings each module.
EXTRAS = {
    "vllm": "vllm",
    "flash_attn": "flash-attn",
    "liger_kernel": "liger",
    "peft": "lora",
    "torchao": "low-memory",
    "wandb": "wandb",
}


def is_installed(module: str) -> bool:
    """Whether `module`, a top-level one, can be found; it is not imported."""
    return find_spec(module) is not None


def install_hint(extra: str) -> str:
    """How to install an extra; the project is on no package index."""
    return f"run pip install '.[{extra}]' in a checkout"


def require_package(module: str, key: str) -> None:
    """Refuse the value of the configuration key `key` if `module`, which it needs, is missing.

    Raises:
        ConfigError: names the key, the module and how to install it.
    """
    if not is_installed(module):
        raise ConfigError(f"{key}: {module} is not installed; {install_hint(EXTRAS[module])}")


def require_packages(config: Config) -> None:
    """Refuse a configuration whose packages are not installed, before any work.

    Raises:
        ConfigError: see `require_package`.
    """
    needs = (
        ("rollout.engine", config.rollout.engine != "transformers", "vllm"),
        ("model.lora_rank", config.model.lora_rank is not None, "peft"),
        ("optimizer.name", config.optimizer.name == "adamw_8bit", "torchao"),
        ("log.wandb_project", config.log.wandb_project is not None, "wandb"),
    )
    for key, is_needed, module in needs:
        if is_needed:
            require_package(module, key)
