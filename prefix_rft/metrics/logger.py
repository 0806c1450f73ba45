"""What a run tells: metrics.jsonl and rollouts.jsonl, TensorBoard, wandb, and the console."""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

from prefix_rft.checks import UserError
from prefix_rft.config import LogConfig
from prefix_rft.metrics.progress import Kind, make_display

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


Sink = Callable[[int, Mapping[str, float]], None]


class MetricsLogger:
    """Records a run into its folder and shows it; use as a context manager.

    Step t is the t-th step counted from 0: a train record of step t tells of that step, an eval
    record of step t of the weights before it. On entering, the records that a run continued from
    `start_step` will make again are dropped from the files.

    Args:
        run_dir: made where it does not exist.
        num_steps: of the whole run.
        start_step: steps already done; 0 starts the files anew.
    """

    def __init__(
        self, run_dir: Path, config: LogConfig, *, num_steps: int, start_step: int
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.num_steps = num_steps
        self.start_step = start_step
        self._stack = ExitStack()
        self._sinks: list[Sink] = []

    def __enter__(self) -> "MetricsLogger":
        with ExitStack() as stack:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics_path = self.run_dir / METRICS_FILE
            rollouts_path = self.run_dir / ROLLOUTS_FILE
            _keep_records(metrics_path, self._is_done)
            _keep_records(rollouts_path, self._is_done)
            self._metrics = stack.enter_context(metrics_path.open("a", encoding="utf-8"))
            self._rollouts = stack.enter_context(rollouts_path.open("a", encoding="utf-8"))
            if self.config.tensorboard:
                self._sinks.append(stack.enter_context(_tensorboard(self.run_dir, self.start_step)))
            if self.config.wandb_project is not None:
                project = self.config.wandb_project
                self._sinks.append(
                    stack.enter_context(_wandb(self.run_dir, project, self.start_step))
                )
            self._display = stack.enter_context(
                make_display(
                    self.config.progress, num_steps=self.num_steps, start_step=self.start_step
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _is_done(self, record: Mapping[str, Any]) -> bool:
        evaluated_at_start = record.get("kind") == "eval" and record["step"] == self.start_step > 0
        return record["step"] < self.start_step or evaluated_at_start

    def log(self, step: int, metrics: Mapping[str, float], *, kind: Kind = "train") -> None:
        """Record the metrics of one step; a value that is not finite is written as null."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        _append(self._metrics, {"step": step, "kind": kind} | dict.fromkeys(values) | finite)
        for sink in self._sinks:
            sink(step, finite)
        self._display.show(step, finite, kind)

    def log_rollouts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep rollouts of one step, one line each, for the report."""
        for sample in samples:
            _append(self._rollouts, {"step": step, **sample})

    def message(self, text: str) -> None:
        """Print a line above the live display."""
        self._display.message(text)


class NoLogger:
    """The logger of a rank that has nothing to tell."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float], *, kind: Kind = "train") -> None: ...

    def log_rollouts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def message(self, text: str) -> None: ...


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file; a last line without its line end, torn by a crash, is left out.

    Raises:
        UserError: another line is no valid JSON.
    """
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: no valid JSON: {error}") from None
    return records


def _keep_records(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop the other records of a jsonl file, all at once or not at all."""
    if not path.exists():
        return
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8") as stream:
        for record in filter(keep, read_records(path)):
            _append(stream, record)
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _append(stream: TextIO, record: Mapping[str, Any]) -> None:
    stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


@contextmanager
def _tensorboard(run_dir: Path, start_step: int) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step) as writer:

        def add(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        yield add


@contextmanager
def _wandb(run_dir: Path, project: str, start_step: int) -> Iterator[Sink]:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "log.wandb_project: needs the package wandb: pip install 'prefix-rft[wandb]'"
        ) from error
    id_file = run_dir / "wandb_id"
    if start_step == 0 or not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    with wandb.init(
        project=project,
        name=run_dir.name,
        dir=str(run_dir),
        id=id_file.read_text(),
        resume="allow",
    ) as run:
        yield lambda step, metrics: run.log(dict(metrics), step=step)
