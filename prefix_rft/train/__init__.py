"""One step, and a whole run."""

from prefix_rft.train.checkpoint import checkpoint_step, list_checkpoints
from prefix_rft.train.interrupt import Stopped
from prefix_rft.train.lock import RunLock, live_holder
from prefix_rft.train.rehearsal import RehearsalError, print_rehearsal
from prefix_rft.train.run import evaluate_model, export_checkpoint, train

__all__ = [
    "RehearsalError",
    "RunLock",
    "Stopped",
    "checkpoint_step",
    "evaluate_model",
    "export_checkpoint",
    "list_checkpoints",
    "live_holder",
    "print_rehearsal",
    "train",
]
