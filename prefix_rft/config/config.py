"""The configuration of a run: its sections together, from a TOML file and back."""

import dataclasses
import difflib
import functools
import tomllib
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import Field

from prefix_rft.checks import ConfigError, config_section, require
from prefix_rft.config.data_sections import (
    BaseConfig,
    DataConfig,
    Seed,
    TestbedConfig,
    TiersConfig,
)
from prefix_rft.config.sections import (
    START,
    EvalConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    ShardingConfig,
    TrainerConfig,
    VLLMConfig,
)
from prefix_rft.methods import METHODS, LossConfig, Method, Setting, find_method

_Config = TypeVar("_Config")


def _with_method_sections(config: type[_Config]) -> type[_Config]:
    """A subclass with a field for each registered method's section that is not there yet."""
    known = {field.name: field.type for field in dataclasses.fields(config)}
    sections = {method.name: method.section for method in METHODS.values() if method.section}
    added = {name: made for name, made in sections.items() if known.get(name) is not made}
    for name in added:
        require(name not in known, "method.name", "a name that is no section's yet", name)
    if not added:
        return config
    body = {name: field(default_factory=section) for name, section in added.items()}
    body |= {"__annotations__": added, "__doc__": config.__doc__, "__module__": config.__module__}
    return config_section()(type(config.__name__, (config,), body))


@_with_method_sections
@config_section()
class Config:
    """Everything that decides a run: these sections, and those of the methods."""

    # name of the run and its folder
    name: Annotated[
        str,
        Field(pattern=r"^[\w.-]*\w$", description="letters, digits, '_', '-' and '.'"),
    ] = "run"
    output_dir: str | None = None  # run folder; None: runs/<name>
    seed: Seed = 0  # seed of everything random

    data: DataConfig = field(default_factory=DataConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        method = find_method(self.method.name)
        method.check(
            self.section(method),
            group_size=self.rollout.group_size,
            max_response_length=self.rollout.max_response_length,
        )
        require(
            self.reward.overlong_tokens < self.rollout.max_response_length,
            "reward.overlong_tokens",
            f"below rollout.max_response_length ({self.rollout.max_response_length})",
            self.reward.overlong_tokens,
        )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_length
        positions = self.model.max_position_embeddings
        require(
            positions is None or positions >= longest,
            "model.max_position_embeddings",
            f"at least data.max_prompt_tokens + rollout.max_response_length ({longest})",
            positions,
        )
        require(
            self.method.advantage_scale == "none" or method.scales_advantages,
            "method.advantage_scale",
            f'"none" with the method {method.name}, whose advantages have a scale of their own',
            self.method.advantage_scale,
        )
        # With these the engine samples from something else than the trainer's softmax.
        for name in ("kv_cache_dtype", "quantization"):
            value = self.vllm.options.get(name, "auto")
            require(
                value == "auto" or self.loss.importance_cap is not None,
                f"vllm.options.{name}",
                "a correction of the engine's log-probs beside it, by loss.importance_cap",
                value,
            )
        require(
            not self.loss.uses_kl or make_method(self, eos_token_id=0).uses_reference,
            "loss.kl",
            f"none with the method {method.name}, which has no KL term of this section",
            self.loss.kl,
        )
        require(
            self.model.lora_rank is None
            or self.reference.model == START
            or not self.reference.update_every,
            "reference.update_every",
            f'0 with adapters, or reference.model = "{START}"',
            self.reference.update_every,
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.seed is None else self.data.seed

    def section(self, method: type[Method]) -> Any:
        """The section of `method`; None where it has none."""
        return getattr(self, method.name) if method.section else None


def make_method(config: Config, *, eos_token_id: int) -> Method:
    """The method `config.method.name`, with its section."""
    method = find_method(config.method.name)
    setting = Setting(
        seed=config.seed,
        num_steps=config.trainer.num_steps,
        prompts_per_step=config.trainer.prompts_per_step,
        prompts_per_update=config.trainer.prompts_per_update,
        group_size=config.rollout.group_size,
        max_response_length=config.rollout.max_response_length,
        mask_truncated=config.rollout.mask_truncated,
        eos_token_id=eos_token_id,
        advantage_scale=config.method.advantage_scale,
        loss=config.loss,
    )
    return method(config.section(method), setting)


@functools.cache
def _config_type(methods: tuple[type[Method], ...]) -> type[Config]:
    return _with_method_sections(Config)


def config_type() -> type[Config]:
    """`Config` with the sections of all methods registered by now, one's own included."""
    return _config_type(tuple(METHODS.values()))


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration of a nested dict as TOML gives it; an absent field keeps its default.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a value of the wrong type, or
            a value that a section refuses.
    """
    match values:
        case {"method": {"name": str(name)}}:
            find_method(name)  # registers a method of one's own, and with it its section
    config = config_type()
    fields = dataclasses.fields(config)
    sections = {field.name: field.type for field in fields if dataclasses.is_dataclass(field.type)}
    tables = {name: values[name] for name in sections if isinstance(values.get(name), dict)}
    known = [field.name for field in fields]
    for name, section in sections.items():
        known += [f"{name}.{field.name}" for field in dataclasses.fields(section)]
    for key in (*values, *(f"{name}.{key}" for name, table in tables.items() for key in table)):
        if key not in known:
            raise ConfigError(f"unknown key {key!r}; did you mean {_nearest(key, known)!r}?")
    return config(**values | {name: sections[name](**table) for name, table in tables.items()})


def load_config(name_or_path: str | Path) -> Config:
    """Read a TOML file, or a configuration shipped with the package by its bare name.

    Raises:
        ConfigError: no such file or name, no valid TOML, or whatever `config_from_dict` refuses;
            the message starts with the file.
    """
    file = Path(name_or_path)
    if not file.is_file():
        shipped = Path(__file__).parents[1] / "configs"
        names = sorted(entry.stem for entry in shipped.iterdir())
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


def by_key(config: Config) -> dict[str, object]:
    """The values of a configuration by their dotted keys."""
    values: dict[str, object] = {}
    for name, value in dataclasses.asdict(config).items():
        is_section = dataclasses.is_dataclass(getattr(config, name))
        values |= {f"{name}.{key}": x for key, x in value.items()} if is_section else {name: value}
    return values


def save_config(config: Config, path: str | Path) -> None:
    """Write every field that is not None; `load_config` of the file equals `config`.

    Of one's own methods only the chosen one is written: its name is what finds its section again.
    """
    kept = {field.name for field in dataclasses.fields(Config)}
    kept.add(find_method(config.method.name).name)
    values = {name: v for name, v in dataclasses.asdict(config).items() if name in kept}
    text = tomli_w.dumps(_without_none(values))
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
