"""The packages that only some configurations need."""

from importlib.util import find_spec

from prefix_rft.checks import ConfigError
from prefix_rft.config.config import Config


def require_packages(config: Config) -> None:
    """Refuse a configuration whose packages are not installed, before any work.

    Raises:
        ConfigError: names the key, the package and how to install it.
    """
    needs = (
        ("rollout.engine", config.rollout.engine != "transformers", "vllm", "vllm"),
        ("model.lora_rank", config.model.lora_rank is not None, "peft", "lora"),
        ("optimizer.name", config.optimizer.name == "adamw_8bit", "torchao", "low-memory"),
        ("log.wandb_project", config.log.wandb_project is not None, "wandb", "wandb"),
    )
    for key, is_needed, package, extra in needs:
        if is_needed and find_spec(package) is None:
            raise ConfigError(
                f"{key}: {package} is not installed; pip install 'prefix-rft[{extra}]'"
            )
