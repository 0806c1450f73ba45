"""What the folder of a run contains, for those who find one on disk."""

from pathlib import Path

from prefix_rft.checks import ConfigError

CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"  # results of the base and of the trained model
OUTCOMES_FILE = "evaluation.jsonl"  # of the trained model, problem by problem
BEST_FOLDER = "best"  # the model of the best evaluation, where `eval.select_by` asks for it
MODEL_FOLDER = "model"  # the trained model in Hugging Face format, written at the end


def model_at(path: str) -> str:
    """The model folder or hub id that `path` stands for: a run folder stands for its final model.

    Raises:
        ConfigError: the run has none yet.
    """
    if not is_run_folder(path):
        return path
    folder = Path(path) / MODEL_FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"{path} has no final model yet: write one of its checkpoints with prefix-rft export, "
            "and give that folder"
        )
    return str(folder)


def run_folder_of(path: str | Path) -> Path | None:
    """The run folder that `path` is, or that it lies in (as a checkpoint or a model); else None."""
    path = Path(path)
    return next((folder for folder in (path, *path.parents[:2]) if is_run_folder(folder)), None)


def is_run_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()
