"""The command `prefix-rft`. Each subcommand imports the heavy modules it needs when it runs."""

import argparse
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from prefix_rft.checks import UserError
from prefix_rft.config import (
    CONFIG_FILE,
    Config,
    config_type,
    load_config,
    model_at,
    run_folder_of,
)
from prefix_rft.methods import DEFAULT_METHOD, find_method

Overrides = Annotated[Config, arg(name="")]
RunFolder = Annotated[Positional[Path], arg(metavar="RUN_FOLDER")]
# What loggers say while transformers imports torchao; no run uses what it is about.
_IMPORT_NOISE = {"torchao": "Failed to load ", "torch.utils._pytree": "is an Enum subclass"}
# The argument that a command takes before its options.
_FIRST = {
    "train": "config",
    "eval": "models",
    "demonstrate": "model",
    "serve": "config",
    "doctor": "config",
}


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model; options after CONFIG override its fields."""

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """Name of a shipped configuration, or a TOML file; comes before all options."""
    resume: bool = False
    """Continue from the newest checkpoint in the run folder, if it has one."""
    overrides: Overrides

    def run(self) -> int:
        from prefix_rft.train import Stopped, list_checkpoints, train

        run_dir = self.overrides.run_dir
        if not self.resume and list_checkpoints(run_dir):
            raise UserError(
                f"{run_dir} already contains checkpoints: continue that run with --resume, "
                "or choose another --name or --output-dir"
            )
        try:
            summary = train(self.overrides, resume=self.resume)
        except Stopped as stop:
            if _is_main_rank():
                name = signal.Signals(stop.signal).name
                print(f"stopped by {name}; --resume continues from the last checkpoint")
            return 130 if stop.signal == signal.SIGINT else 0
        if _is_main_rank():
            _print_results(summary)
        return 0


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a model on the held-out problems, or models on benchmarks."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL [MODEL ...]")]
    """Run folders (their configurations and final models are used), checkpoints or models of
    theirs, model folders or hub ids."""
    suite: str | None = None
    """Benchmarks by comma: math (the six of the paper), aime24, ..., gsm8k; list shows them."""
    suite_data: str | None = None
    """File with the problems of the suites, told apart by a column data_source; None: the hub."""
    prompt: str | None = None
    """think, qwen-math, r1-zero or none (the chat template alone); None: as in training."""
    num_samples: int | None = None
    """Samples of a problem of a suite; this and what follows is by default as in the protocol."""
    temperature: float | None = None
    """Of those samples."""
    top_p: float | None = None
    """Of those samples."""
    max_tokens: int | None = None
    """Tokens of a response to a problem of a suite at most."""
    greedy: bool = False
    """Also one answer at temperature 0 to each problem of a suite."""
    pass_at: tuple[int, ...] = ()
    """The ks of pass@k; none: the number of samples."""
    limit: int | None = None
    """Problems of a suite at most, evenly spaced."""
    chunk_size: int = 512
    """Samples that are generated and kept together: the most that an interruption costs."""
    out: Path = Path("evals")
    """Where results of suites go, a folder a model; what is there already is not made again."""
    overrides: Overrides

    def run(self) -> int:
        if self.suite == "list":
            from prefix_rft.evaluate import suite_list

            print(suite_list())
            return 0
        if self.suite is None:
            return self._run_held_out()
        from prefix_rft.evaluate import SuiteOptions, run_suites

        named = {field.name for field in fields(SuiteOptions)} & {f.name for f in fields(self)}
        run_suites(
            self.overrides,
            [_model_folder(model) for model in self.models],
            SuiteOptions(
                names=self.suite,
                data=self.suite_data,
                **{name: getattr(self, name) for name in named},
            ),
            self.out,
            prints=_is_main_rank(),
        )
        return 0

    def _run_held_out(self) -> int:
        from prefix_rft.train import evaluate_model

        if len(self.models) != 1:
            raise UserError(f"MODEL: expected one without --suite, got {len(self.models)}")
        results = evaluate_model(self.overrides, model_at(_model_folder(self.models[0])))
        if _is_main_rank():
            print(json.dumps(results, indent=2))
        return 0


@dataclass(frozen=True, kw_only=True)
class Demonstrate:
    """Let a model answer the training problems of data.path, and keep what is correct.

    The file that it writes is one for data.path. What is generated is kept beside it in chunks, so
    that a run which was stopped goes on. Exit status 1: no problem was solved.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """The teacher: a run or its checkpoint, whose configuration is used; a folder, or a hub id."""
    out: Path
    """The parquet file to write."""
    num_samples: int = 4
    """Responses to each problem."""
    temperature: float = 0.6
    """Of the responses."""
    top_p: float = 1.0
    """Of the responses."""
    max_tokens: int | None = None
    """Tokens of a response at most; None: rollout.max_response_length."""
    keep: Literal["shortest", "first", "all"] = "shortest"
    """Which of the correct responses to a problem; all: a row for each."""
    only_solved: bool = False
    """Leave out problems without a demonstration."""
    chunk_size: int = 512
    """Responses that are generated and kept together: the most that an interruption costs."""
    overrides: Overrides

    def run(self) -> int:
        from prefix_rft.evaluate import DemonstrateOptions, demonstrate

        options = {field.name: getattr(self, field.name) for field in fields(DemonstrateOptions)}
        counts = demonstrate(
            self.overrides, _model_folder(self.model), DemonstrateOptions(**options)
        )
        if _is_main_rank():
            print(*counts.lines(), sep="\n")
            if counts.num_kept:
                print(f"the demonstrations are in {self.out}")
            else:
                print(f"no demonstration: {self.out} is not written", file=sys.stderr)
        return 0 if counts.num_kept else 1


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Run the vLLM server for a trainer whose rollout.engine is vllm_server."""

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """The trainer's configuration; comes before all options."""
    host: str = "127.0.0.1"
    """Address to listen on. Requests carry the server's token, but in clear: keep it private."""
    port: int = 8000
    """Port to listen on."""
    overrides: Overrides

    def run(self) -> int:
        from prefix_rft.rollout import serve_vllm

        serve_vllm(self.overrides, host=self.host, port=self.port)
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a checkpoint in Hugging Face format."""

    run_dir: RunFolder
    """The folder of a run."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to write."""
    step: int | None = None
    """Number of steps done at the checkpoint; None: the newest checkpoint."""

    def run(self) -> int:
        from prefix_rft.train import export_checkpoint

        export_checkpoint(self.run_dir, self.step, self.out)
        print(f"wrote {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html for a run, finished or not: curves and rollouts on one page."""

    run_dir: RunFolder
    """The folder of a run."""

    def run(self) -> int:
        from prefix_rft.metrics import write_report

        print(f"wrote {write_report(self.run_dir)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Grade:
    """Grade the responses of a file: one JSON line each to stdout, a summary to stderr."""

    file: Annotated[Positional[Path], arg(metavar="FILE.jsonl")]
    """A line for each response: {"answer": the gold answer, "response": the text}."""
    answer_pattern: str = "boxed"
    """Where a response has its answer: boxed, or the marker that it follows, such as "####"."""
    num_workers: int = 2
    """Grader processes."""
    timeout_s: float = 5.0
    """Seconds that one answer may take."""
    memory_mib: int = 1024
    """Memory that a grader process may use."""

    def run(self) -> int:
        from prefix_rft.reward import grade_file

        if not self.answer_pattern:
            raise UserError("--answer-pattern: expected boxed or a marker, got nothing")
        for option in ("num_workers", "timeout_s", "memory_mib"):
            value = getattr(self, option)
            if not 0 < value < math.inf:
                raise UserError(f"--{option.replace('_', '-')}: expected above 0, got {value}")
        grade_file(
            self.file,
            answer_pattern=self.answer_pattern,
            num_workers=self.num_workers,
            timeout_s=self.timeout_s,
            memory_mib=self.memory_mib,
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show what is installed, what a run will use, and how much memory it needs."""

    config: Annotated[Positional[str | None], arg(metavar="CONFIG")] = None
    """Name of a shipped configuration, or a TOML file; comes before all options."""
    num_processes: int = 1
    """Processes that torchrun will start on all machines together; the plan is for one of them."""
    device_gib: float | None = None
    """Plan for a CUDA device with this much memory; None: for the device of this machine."""
    rehearse: bool = False
    """Take one worst-case step on this machine's device, with made-up data, and print its peaks."""
    overrides: Overrides

    def run(self) -> int:
        from prefix_rft.doctor import print_diagnosis, print_memory

        for option in ("num_processes", "device_gib"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise UserError(f"--{option.replace('_', '-')}: expected above 0, got {value}")
        if self.rehearse:
            return self._rehearse()
        print_diagnosis(self.overrides)
        if self.config is None:
            return 0
        print_memory(self.overrides, num_processes=self.num_processes, device_gib=self.device_gib)
        return 0

    def _rehearse(self) -> int:
        if self.config is None:
            raise UserError("--rehearse: expected a CONFIG, got none")
        if self.num_processes != 1 or self.device_gib is not None:
            raise UserError(
                "--rehearse: runs on the devices that are there; expected no --num-processes "
                "(start it with torchrun) and no --device-gib"
            )
        from prefix_rft.train import print_rehearsal

        print_rehearsal(self.overrides)
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Run several configurations with several seeds from one base, and write their table and page.

    Each run has its own folder in runs/compare/<name>. What is done is skipped, what was stopped is
    resumed. Exit status 1: a run failed, and the others went on.
    """

    comparison: Annotated[Positional[str], arg(metavar="FILE")]
    """Name of a shipped comparison, or a TOML file: config, seeds, and a table for each cell."""
    jobs: int = 1
    """Runs at a time; without OMP_NUM_THREADS they share the CPUs."""
    launcher: str | None = None
    """What starts each run in the place of python, such as "torchrun --nproc-per-node 8"."""
    only: str | None = None
    """Names of cells, with commas: only these are run, and the cells that they start from."""
    tables_only: bool = False
    """Run nothing, write the tables of what is done."""
    output_dir: Path | None = None
    """Folder of the runs and the tables; None: runs/compare/<name>."""

    def run(self) -> int:
        from prefix_rft.compare import compare

        return compare(
            self.comparison,
            jobs=self.jobs,
            launcher=self.launcher,
            only=None if self.only is None else tuple(self.only.split(",")),
            tables_only=self.tables_only,
            output_dir=self.output_dir,
        )


Command = Train | Eval | Demonstrate | Serve | Export | Report | Grade | Doctor | Compare


def parse(argv: Sequence[str]) -> Command:
    """The command in `argv`; exits with status 2 on an unknown option, naming the nearest one.

    Raises:
        UserError: the configuration cannot be loaded, or does not come first.
    """
    first = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None
    name = argv[0] if argv else None
    # A method of one's own adds options, so it must be known before they are read.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--method.name", dest="method", default=DEFAULT_METHOD)
    find_method(early.parse_known_args(argv)[0].method)
    config = config_type()()
    given = _FIRST.get(name)
    if first is not None and given == "config":
        config = load_config(first)
    elif (
        first is not None
        and name in ("eval", "demonstrate")
        and (run_dir := run_folder_of(first)) is not None
    ):
        config = load_config(run_dir / CONFIG_FILE)
    missing = tyro.MISSING_NONPROP
    command = tyro.cli(
        Annotated[Train, subcommand("train", default=Train(config=missing, overrides=config))]
        | Annotated[Eval, subcommand("eval", default=Eval(models=missing, overrides=config))]
        | Annotated[
            Demonstrate,
            subcommand(
                "demonstrate", default=Demonstrate(model=missing, out=missing, overrides=config)
            ),
        ]
        | Annotated[Serve, subcommand("serve", default=Serve(config=missing, overrides=config))]
        | Annotated[Export, subcommand("export")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Grade, subcommand("grade")]
        | Annotated[Doctor, subcommand("doctor", default=Doctor(overrides=config))]
        | Annotated[Compare, subcommand("compare")],
        prog="prefix-rft",
        description="Reinforcement fine-tuning with prefixes of demonstrations.",
        args=argv,
    )
    # The configuration sets the defaults of the options, so it must be known before they are read.
    value = None if given is None else getattr(command, given)
    if given is not None and (next(iter(value), None) if given == "models" else value) != first:
        raise UserError(f"{given}: expected right after {name!r}, before all options")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0: done, 2: an error the user can fix, 130: interrupted."""
    # Threads that spin while waiting slow down the threads they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, noise in _IMPORT_NOISE.items():
        logging.getLogger(name).addFilter(lambda record, noise=noise: noise not in str(record.msg))
    status = _run(sys.argv[1:] if argv is None else argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Interpreter shutdown can abort on a thread of the process group, and the launcher would
        # report a successful run as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(argv: Sequence[str]) -> int:
    try:
        return parse(argv).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _model_folder(path: str) -> str:
    """`path`, or for a checkpoint of a run the model that is exported from it once."""
    run_dir = run_folder_of(path)
    if run_dir is None or Path(path).parent != run_dir / "checkpoints":
        return path
    from prefix_rft.train import checkpoint_step, export_checkpoint

    folder = run_dir / "exports" / Path(path).name
    if not folder.is_dir():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"{path}: write its model first, with prefix-rft export")
        export_checkpoint(run_dir, checkpoint_step(Path(path)), folder)
    return str(folder)


def _print_results(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    from prefix_rft.metrics import COLUMNS, result_rows

    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for row in result_rows(summary):
        table.add_row(*row)
    Console(highlight=False).print(table)


def _is_main_rank() -> bool:
    """Whether this process prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
