"""A whole run: base, data, evaluation, the training loop, evaluation again, export, report."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from prefix_rft.config import (
    BEST_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    OUTCOMES_FILE,
    Config,
    load_config,
    require_packages,
    save_config,
)
from prefix_rft.data import LoadReport, resolve_base
from prefix_rft.evaluate import selection_metric
from prefix_rft.metrics import LogProbGapError, MetricsLogger, NoLogger, Watch, write_report
from prefix_rft.model import (
    World,
    export,
    host_config,
    load_model,
    load_tokenizer,
    resolve_device,
    try_export,
)
from prefix_rft.reward import RewardError
from prefix_rft.rollout import EngineError, fit_lengths
from prefix_rft.train.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    checkpoint_step,
    list_checkpoints,
    load_model_weights,
)
from prefix_rft.train.interrupt import Interrupt, Stopped
from prefix_rft.train.lock import RunLock, held
from prefix_rft.train.resume import (
    changes_of,
    is_finished,
    open_run,
    steps_follow_from_data,
    write_summary,
)
from prefix_rft.train.setup import Setup, position_limit
from prefix_rft.train.trainer import Trainer


def train(config: Config, *, resume: bool = False) -> dict:
    """Run `config` from its base to its report, in the folder `config.run_dir`.

    Under torchrun all ranks run it together; rank 0 keeps the folder, which is locked meanwhile.

    Args:
        resume: continue from the newest checkpoint of the folder, if there is one; a finished run
            is left as it is.
    Returns:
        the summary: "base" and "trained", each as `summarize` returns it; "data", what the rows
        came to; "model_step", the steps done by the model that is written.
    Raises:
        UserError: something the user can put right.
        Stopped: SIGINT or SIGTERM came; the last whole step is in a checkpoint.
    """
    with (
        World(config.sharding, resolve_device(config.model)) as world,
        held(config.run_dir, world) as lock,
    ):
        return _train(config, world, lock, resume=resume)


def _train(config: Config, world: World, lock: RunLock, *, resume: bool) -> dict:
    summary, checkpoints = world.broadcast(lambda: open_run(config, resume))
    if not steps_follow_from_data(config) and is_finished(config, summary, checkpoints):
        return _nothing_left(config, summary, world)
    require_packages(config)

    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(world))
        with interrupt.cancellable():
            base = resolve_base(config) if world.is_main else None
        base = world.broadcast(lambda: base)
        with interrupt.cancellable() if world.size == 1 else nullcontext():
            setup = stack.enter_context(Setup(config, base, world))
            trainer = setup.trainer()
        if is_finished(trainer.config, summary, checkpoints):
            return _nothing_left(config, summary, world)
        run = _Run(setup, trainer, interrupt, lock, summary, checkpoints)
        notices = world.broadcast(run.notices)
        if not checkpoints:
            run.save_config()
        run.logger = stack.enter_context(_logger(trainer.config, world, checkpoints))
        for notice in notices:
            run.logger.message(notice)
        run.begin()
        run.loop()
        run.evaluate_trained()
    run.write_results()
    return summary


class _Run:
    """The parts of a run between its setup and its results; `summary` is filled as it goes on."""

    def __init__(
        self,
        setup: Setup,
        trainer: Trainer,
        interrupt: Interrupt,
        lock: RunLock,
        summary: dict,
        checkpoints: list[Path],
    ) -> None:
        self.config = trainer.config
        self.run_dir = self.config.run_dir
        self.world = setup.world
        self.setup = setup
        self.trainer = trainer
        self.interrupt = interrupt
        self.lock = lock
        self.summary = summary
        self.checkpoints = checkpoints  # those to continue from
        self.watch = Watch(self.config.data.answer_pattern)
        self.logger: MetricsLogger | NoLogger = NoLogger()

    def notices(self) -> list[str]:
        """What the user should know before the work begins.

        Raises:
            ConfigError: the model could not be written at the end.
        """
        setup = self.setup
        notices = [str(report) for report in setup.data.reports]
        if notice := try_export(setup.policy.model, setup.tokenizer):
            notices.append(notice)
        if left_out := len(setup.data.train) - len(self.trainer.problems):
            method = self.config.method.name
            notices.append(f"{method} cannot learn from {left_out} problems: left out")
        if self.checkpoints and (changes := changes_of(self.config)):
            told = (f"{key} {before!r} -> {now!r}" for key, (before, now) in changes.items())
            notices.append(f"changed since the run began: {', '.join(told)}")
        return notices

    def begin(self) -> None:
        """Evaluate the base, or take up the last checkpoint, or both."""
        summary, trainer = self.summary, self.trainer
        summary["data"] = _row_counts(self.setup.data.reports)
        if "base" not in summary:
            self.logger.message("evaluating the base model")
            summary["base"] = self.setup.evaluate(self.interrupt, version=0)
            self.save_summary()
            if warning := self.watch.of_evaluation(summary["base"]):
                self.logger.message(warning)
        if self.checkpoints:
            self.logger.message(f"resuming from {self.checkpoints[-1]}")
            trainer.restore(self.checkpoints[-1])
            self.save_config()
        else:
            self.log_evaluation(0, summary["base"])
        if trainer.step_index < self.config.trainer.num_steps:
            for name in ("trained", "model_step"):  # left by a shorter run
                summary.pop(name, None)
            self.save_summary()

    def loop(self) -> None:
        """Train to the last step; a checkpoint every n steps, at the end, and when stopped."""
        config, trainer = self.config, self.trainer
        num_steps, every = config.trainer.num_steps, config.trainer.checkpoint_every
        saved = trainer.step_index
        with CheckpointWriter(
            self.run_dir,
            keep=config.trainer.keep_checkpoints,
            in_background=config.trainer.async_checkpoints,
            world=self.world,
        ) as checkpoints:
            try:
                while trainer.step_index < num_steps:
                    step = trainer.step_index
                    with _profiled(config, step, self.world):
                        metrics, sample = trainer.train_step(self.interrupt)
                    self.logger.log(step, metrics)
                    if warning := self.watch.of_step(metrics, sample):
                        self.logger.message(warning)
                    if step % config.trainer.sample_every == 0:
                        self.logger.log_rollouts(step, [sample])
                    done = trainer.step_index
                    if done == num_steps or (every and done % every == 0):
                        saved = trainer.save(checkpoints)
                    with self.interrupt.cancellable():
                        checkpoints.check()
                        self.lock.check()
                    if config.eval.every and done % config.eval.every == 0 and done < num_steps:
                        results = self.setup.evaluate(self.interrupt, version=done)
                        self.log_evaluation(done, results)
                        self.keep_best(done, results)
            # They come between two updates: the weights are whole.
            except (Stopped, RewardError, LogProbGapError, EngineError):
                if trainer.step_index > saved:
                    trainer.save(checkpoints)
                checkpoints.finish()
                raise

    def evaluate_trained(self) -> None:
        """The last results are in the summary before anything else can fail."""
        if "trained" not in self.summary:
            self.logger.message("evaluating the trained model")
            step = self.trainer.step_index
            self.summary["trained"] = self.setup.evaluate(
                self.interrupt, version=step, outcomes=self.run_dir / OUTCOMES_FILE
            )
            self.log_evaluation(step, self.summary["trained"])
            self.keep_best(step, self.summary["trained"])
        self.world.broadcast(self.lock.check)
        self.save_summary()

    def keep_best(self, step: int, results: dict) -> None:
        """Write the model if no evaluation before was better by `eval.select_by`."""
        if self.config.eval.select_by is None:
            return
        metric = selection_metric(self.config, results)
        value, best = results[metric], self.summary.get("best", {})
        if best.get("metric") == metric and value <= best["value"]:
            return
        export(
            self.setup.policy.model, self.setup.tokenizer, self.run_dir / BEST_FOLDER, self.world
        )
        self.summary["best"] = {"step": step, "metric": metric, "value": value}
        self.save_summary()
        self.logger.message(f"best so far: {metric} {value:.3f} at step {step}")

    def write_results(self) -> None:
        """The report, and whatever becomes of it the model."""
        try:
            if self.world.is_main:
                write_report(self.run_dir)
        finally:
            model, tokenizer = self.setup.policy.model, self.setup.tokenizer
            export(model, tokenizer, self.run_dir / MODEL_FOLDER, self.world)
        self.summary["model_step"] = self.config.trainer.num_steps
        self.save_summary()

    def save_config(self) -> None:
        self.world.broadcast(lambda: save_config(self.config, self.run_dir / CONFIG_FILE))

    def save_summary(self) -> None:
        write_summary(self.run_dir, self.summary, self.world)

    def log_evaluation(self, step: int, results: dict) -> None:
        figures = {f"eval/{name}": x for name, x in results.items() if isinstance(x, int | float)}
        self.logger.log(step, figures, kind="eval")


def _nothing_left(config: Config, summary: dict, world: World) -> dict:
    if world.is_main:
        print(f"{config.run_dir} is finished, nothing is left to do")
    return summary


def _logger(config: Config, world: World, checkpoints: list[Path]) -> MetricsLogger | NoLogger:
    if not world.is_main:
        return NoLogger()
    return MetricsLogger(
        config.run_dir,
        config.log,
        num_steps=config.trainer.num_steps,
        start_step=checkpoint_step(checkpoints[-1]) if checkpoints else 0,
    )


def evaluate_model(config: Config, model_path: str) -> dict:
    """Results of the model at `model_path`, a folder or hub id, on the held-out problems.

    What the dataset's rows came to is told on stderr, and counted under "data". Default lengths are
    cut to what the model can take.
    """
    fitting = fit_lengths(config, position_limit(config, model_path))
    with (
        World(config.sharding, resolve_device(config.model)) as world,
        Setup(fitting, model_path, world, trains=False) as setup,
        Interrupt(world) as interrupt,
    ):
        results = setup.evaluate(interrupt, version=0)
        warning = Watch(config.data.answer_pattern).of_evaluation(results)
        if world.is_main:
            told = [*setup.data.reports, *filter(None, [warning])]
            if fitting != config:
                told.insert(
                    0,
                    f"cut to the model: data.max_prompt_tokens {fitting.data.max_prompt_tokens}, "
                    f"rollout.max_response_length {fitting.rollout.max_response_length}",
                )
            print(*told, sep="\n", file=sys.stderr)
        return results | {"data": _row_counts(setup.data.reports)}


def _row_counts(reports: Sequence[LoadReport]) -> list[dict]:
    """The reports as JSON has them, with the number of rows by kind of finding."""
    return [
        asdict(report) | {"findings": {found.kind: found.count for found in report.findings}}
        for report in reports
    ]


def export_checkpoint(run_dir: Path, step: int | None, folder: Path) -> None:
    """Write the model of a run's checkpoint in Hugging Face format.

    Args:
        step: steps done at the checkpoint; None: the newest.
    Raises:
        CheckpointError: there is none such, or it is damaged.
    """
    checkpoints = {checkpoint_step(path): path for path in list_checkpoints(run_dir)}
    if not checkpoints or (step is not None and step not in checkpoints):
        wanted = "any step" if step is None else f"step {step}"
        raise CheckpointError(
            f"{run_dir}: expected a checkpoint of {wanted}, got {sorted(checkpoints) or 'none'}"
        )
    config = load_config(run_dir / CONFIG_FILE)
    base = resolve_base(config)
    model = load_model(host_config(config.model), base)
    tokenizer = load_tokenizer(base, config.model.chat_template)
    notice = try_export(model, tokenizer)
    if notice:
        print(notice)
    load_model_weights(checkpoints[max(checkpoints) if step is None else step], model)
    export(model, tokenizer, folder)


def _profiled(config: Config, step: int, world: World) -> AbstractContextManager:
    """A torch profiler around the steps that are to have one, on rank 0."""
    if step not in config.trainer.profile_steps or not world.is_main:
        return nullcontext()
    folder = config.run_dir / "profiles"
    folder.mkdir(exist_ok=True)
    trace = str(folder / f"step-{step:06d}.json.gz")
    return torch.profiler.profile(on_trace_ready=lambda p: p.export_chrome_trace(trace))
