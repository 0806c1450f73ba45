"""What a run is made of: the sections of a configuration, from a TOML file and back."""

from prefix_rft.config.config import Config, config_from_dict, load_config, save_config
from prefix_rft.config.packages import require_packages
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

__all__ = [
    "config_from_dict",
    "BaseConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LossConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrefixConfig",
    "RewardConfig",
    "RolloutConfig",
    "ShardingConfig",
    "TestbedConfig",
    "TrainerConfig",
    "VLLMConfig",
    "load_config",
    "require_packages",
    "save_config",
]
