"""The configuration of a run: its sections together, from a TOML file and back."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field

from prefix_rft.checks import ConfigError, config_section, require
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


@config_section()
class Config:
    """Everything that decides a run."""

    # names the run folder
    name: Annotated[
        str,
        Field(pattern=r"^[\w.-]*\w$", description="letters, digits, '_', '-' and '.'"),
    ] = "run"
    output_dir: str | None = None  # the run folder; None: runs/<name>
    # seed of all that is random
    seed: Annotated[int, Field(ge=0, lt=2**32, description="a whole number in [0, 2**32)")] = 0
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
    fields = dataclasses.fields(Config)
    sections = {field.name: field.type for field in fields if dataclasses.is_dataclass(field.type)}
    tables = {name: values[name] for name in sections if isinstance(values.get(name), dict)}
    known = [field.name for field in fields]
    for name, section in sections.items():
        known += [f"{name}.{field.name}" for field in dataclasses.fields(section)]
    for key in (*values, *(f"{name}.{key}" for name, table in tables.items() for key in table)):
        if key not in known:
            raise ConfigError(f"unknown key {key!r}; did you mean {_nearest(key, known)!r}?")
    return Config(**values | {name: sections[name](**table) for name, table in tables.items()})


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


def _nearest(unknown: str, known: Iterable[str]) -> str:
    """The known dotted key most like `unknown`; one with the same last word goes first."""
    same_word = [key for key in known if key.split(".")[-1] == unknown.split(".")[-1]]
    return difflib.get_close_matches(unknown, same_word or known, n=1, cutoff=0.0)[0]


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
