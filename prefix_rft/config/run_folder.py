"""What the folder of a run contains, for those who find one on disk."""

from pathlib import Path

CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"  # results of the base and of the trained model
MODEL_FOLDER = "model"  # the trained model in Hugging Face format, written at the end


def is_run_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()
