"""One step, and a whole run."""

from prefix_rft.train.checkpoint import list_checkpoints
from prefix_rft.train.interrupt import Stopped
from prefix_rft.train.run import evaluate_model, export_checkpoint, train

__all__ = [
    "Stopped",
    "evaluate_model",
    "export_checkpoint",
    "list_checkpoints",
    "train",
]
