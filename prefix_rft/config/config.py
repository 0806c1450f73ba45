"""The configuration of a run: its sections together, from a TOML file and back."""

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from prefix_rft.checks import ConfigError, require
from prefix_rft.config.sections import (
    BaseConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    RewardConfig,
    RolloutConfig,
    ShardingConfig,
    TestbedConfig,
    TrainerConfig,
    VLLMConfig,
)
from prefix_rft.config.values import dataclass_from_dict


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    name: str = "run"
    output_dir: str | None = None  # None: runs/<name>
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[\w.-]*\w", self.name) is not None,
            "name",
            "letters, digits, '_', '-' and '.' (it names the run folder)",
            self.name,
        )
        require(0 <= self.seed < 2**32, "seed", "a whole number in [0, 2**32)", self.seed)
        require(
            self.prefix.num_hybrid < self.rollout.group_size,
            "prefix.num_hybrid",
            f"below rollout.group_size ({self.rollout.group_size})",
            self.prefix.num_hybrid,
        )
        require(
            self.prefix.min_prefix_tokens < self.rollout.max_response_length,
            "prefix.min_prefix_tokens",
            f"below rollout.max_response_length ({self.rollout.max_response_length})",
            self.prefix.min_prefix_tokens,
        )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_length
        positions = self.model.max_position_embeddings
        require(
            positions is None or positions >= longest,
            "model.max_position_embeddings",
            f"at least data.max_prompt_tokens + rollout.max_response_length ({longest})",
            positions,
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration of a nested dict as TOML gives it; an absent field keeps its default.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a value of the wrong type, or
            a value that a section refuses.
    """
    return dataclass_from_dict(Config, values)


def load_config(name_or_path: str | Path) -> Config:
    """Read a TOML file, or a configuration shipped with the package by its bare name.

    Raises:
        ConfigError: no such file or name, no valid TOML, or whatever `config_from_dict` refuses;
            the message starts with the file.
    """
    file = Path(name_or_path)
    if not file.is_file():
        shipped = resources.files("prefix_rft") / "configs"
        names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir())
        if str(name_or_path) not in names:
            known = ", ".join(names)
            raise ConfigError(f"config: expected a TOML file or one of {known}, got {name_or_path}")
        file = shipped / f"{name_or_path}.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name_or_path}: no valid TOML: {error}") from None
    try:
        return config_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name_or_path}: {error}") from None


def save_config(config: Config, path: str | Path) -> None:
    """Write every field that is not None; `load_config` of the file equals `config`."""
    text = tomli_w.dumps(_without_none(dataclasses.asdict(config)))
    Path(path).write_text(text, encoding="utf-8")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
