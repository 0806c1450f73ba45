"""What a run is made of: the sections of a configuration, from a TOML file and back."""

from prefix_rft.config.config import (
    Config,
    config_from_dict,
    config_type,
    load_config,
    save_config,
)
from prefix_rft.config.packages import (
    EXTRAS,
    install_hint,
    is_installed,
    require_package,
    require_packages,
)
from prefix_rft.config.run_folder import (
    CONFIG_FILE,
    MODEL_FOLDER,
    SUMMARY_FILE,
    is_run_folder,
    model_at,
)
from prefix_rft.config.sections import (
    BaseConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    ShardingConfig,
    TestbedConfig,
    TrainerConfig,
    VLLMConfig,
)

__all__ = [
    "CONFIG_FILE",
    "EXTRAS",
    "MODEL_FOLDER",
    "SUMMARY_FILE",
    "BaseConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "ShardingConfig",
    "TestbedConfig",
    "TrainerConfig",
    "VLLMConfig",
    "config_from_dict",
    "config_type",
    "install_hint",
    "is_installed",
    "is_run_folder",
    "load_config",
    "model_at",
    "require_package",
    "require_packages",
    "save_config",
]
