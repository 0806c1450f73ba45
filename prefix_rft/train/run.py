"""A whole run: base, data, evaluation, the training loop, evaluation again, export, report."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import torch

from prefix_rft.checks import ConfigError
from prefix_rft.config import (
    CONFIG_FILE,
    MODEL_FOLDER,
    SUMMARY_FILE,
    Config,
    is_run_folder,
    load_config,
    require_packages,
    save_config,
)
from prefix_rft.data import LoadReport, load_problems, resolve_base
from prefix_rft.data_types import Problem
from prefix_rft.evaluate import answer, summarize
from prefix_rft.methods import find_method
from prefix_rft.metrics import LogProbGapError, MetricsLogger, NoLogger, Watch, write_report
from prefix_rft.model import (
    World,
    check_micro_batches,
    export,
    host_config,
    load_model,
    load_model_config,
    load_policy,
    load_tokenizer,
    resolve_device,
    try_export,
    vocabulary_size,
)
from prefix_rft.reward import Rewarder, RewardError
from prefix_rft.rollout import EngineError, fit_lengths, make_engine, max_sequence_length, serving
from prefix_rft.train.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    checkpoint_dir,
    checkpoint_step,
    list_checkpoints,
    load_model_weights,
)
from prefix_rft.train.interrupt import Interrupt, Stopped
from prefix_rft.train.lock import RunLock, held
from prefix_rft.train.trainer import Trainer

# With another of these, steps are no continuation of those done.
_FIXED = ("method.name", "seed")
# Results of the base that were measured with others of these are measured again.
_MEASURED_WITH = (
    *("base.", "data.", "eval.", "model.", "reward.", "testbed.", "seed"),
    *("rollout.max_response_length", "rollout.stop"),
)


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
    run_dir = config.run_dir
    summary, checkpoints = world.broadcast(lambda: _open_run(config, resume))
    if not _steps_follow_from_data(config) and _is_finished(config, summary, checkpoints):
        return _nothing_left(run_dir, summary, world)
    require_packages(config)

    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(world))
        with interrupt.cancellable():
            base = resolve_base(config) if world.is_main else None
        base = world.broadcast(lambda: base)
        with interrupt.cancellable() if world.size == 1 else nullcontext():
            setup = stack.enter_context(Setup(config, base, world))
            trainer = setup.trainer()
            config = trainer.config
            if _is_finished(config, summary, checkpoints):
                return _nothing_left(run_dir, summary, world)
        notices = world.broadcast(lambda: _notices(config, setup, trainer, checkpoints))
        if not checkpoints:
            world.broadcast(lambda: save_config(config, run_dir / CONFIG_FILE))
        logger = stack.enter_context(_logger(config, world, checkpoints))
        for notice in notices:
            logger.message(notice)
        summary["data"] = _row_counts(setup.data.reports)
        watch = Watch(config.data.answer_pattern)
        if "base" not in summary:
            logger.message("evaluating the base model")
            summary["base"] = setup.evaluate(interrupt, version=0)
            _write_summary(run_dir, summary, world)
            if warning := watch.of_evaluation(summary["base"]):
                logger.message(warning)
        if checkpoints:
            logger.message(f"resuming from {checkpoints[-1]}")
            trainer.restore(checkpoints[-1])
            world.broadcast(lambda: save_config(config, run_dir / CONFIG_FILE))
        else:
            logger.log(0, _eval_metrics(summary["base"]), kind="eval")
        if trainer.step_index < config.trainer.num_steps:
            for name in ("trained", "model_step"):  # of a shorter run
                summary.pop(name, None)
            _write_summary(run_dir, summary, world)
        _loop(config, setup, trainer, logger, watch, interrupt, lock)
        if "trained" not in summary:
            logger.message("evaluating the trained model")
            summary["trained"] = setup.evaluate(interrupt, version=trainer.step_index)
            logger.log(trainer.step_index, _eval_metrics(summary["trained"]), kind="eval")
        world.broadcast(lock.check)
        _write_summary(run_dir, summary, world)  # before anything else that can fail
    try:
        if world.is_main:
            write_report(run_dir)
    finally:
        export(setup.policy.model, setup.tokenizer, run_dir / MODEL_FOLDER, world)
    summary["model_step"] = config.trainer.num_steps
    _write_summary(run_dir, summary, world)
    return summary


def _notices(
    config: Config, setup: "Setup", trainer: Trainer, checkpoints: list[Path]
) -> list[str]:
    """What the user should know before the work begins.

    Raises:
        ConfigError: the model could not be written at the end.
    """
    notices = [str(report) for report in setup.data.reports]
    if notice := try_export(setup.policy.model, setup.tokenizer):
        notices.append(notice)
    if left_out := len(setup.data.train) - len(trainer.problems):
        notices.append(f"{config.method.name} cannot learn from {left_out} problems: left out")
    if checkpoints and (changes := _changes(config)):
        told = (f"{key} {before!r} -> {now!r}" for key, (before, now) in changes.items())
        notices.append(f"changed since the run began: {', '.join(told)}")
    return notices


def _open_run(config: Config, resume: bool) -> tuple[dict, list[Path]]:
    """The summary so far and the checkpoints to continue from.

    Raises:
        ConfigError: the steps done are not the beginning of this run.
    """
    if not resume:
        return {}, []
    summary, checkpoints = _read_summary(config.run_dir), list_checkpoints(config.run_dir)
    changes = _changes(config)
    for key in _FIXED if checkpoints else ():
        if key in changes:
            before, now = changes[key]
            raise ConfigError(
                f"{key}: expected {before!r}, with which the steps in {config.run_dir} were done, "
                f"got {now!r}"
            )
    if not _steps_follow_from_data(config) and _is_finished(config, summary, checkpoints):
        return summary, checkpoints
    if any(key.startswith(_MEASURED_WITH) for key in changes):
        summary = {}
    return summary, checkpoints


def _changes(config: Config) -> dict[str, tuple]:
    """(before, now) of each key in which `config` differs from the one in its run folder."""
    if not is_run_folder(config.run_dir):
        return {}
    before = _by_key(load_config(config.run_dir / CONFIG_FILE))
    return {
        key: (before.get(key), now)
        for key, now in _by_key(config).items()
        if key not in ("name", "output_dir") and before.get(key) != now
    }


def _by_key(config: Config) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in asdict(config).items():
        is_section = is_dataclass(getattr(config, name))
        values |= {f"{name}.{key}": x for key, x in value.items()} if is_section else {name: value}
    return values


def _steps_follow_from_data(config: Config) -> bool:
    method = find_method(config.method.name)
    return method.num_steps(config.section(method), 1, 1) is not None


def _for_method(config: Config, problems: list[Problem]) -> tuple[Config, list[Problem]]:
    """The problems that the method learns from, and the configuration with the steps they take.

    Raises:
        ConfigError: there are none.
    """
    method = find_method(config.method.name)
    accepted = [problem for problem in problems if method.accepts(problem)]
    if not accepted:
        raise ConfigError(
            f"data.path: expected problems that {method.name} can learn from, got none among "
            f"{len(problems)}"
        )
    num_steps = method.num_steps(
        config.section(method), len(accepted), config.trainer.prompts_per_step
    )
    if num_steps is not None:
        config = replace(config, trainer=replace(config.trainer, num_steps=num_steps))
    return config, accepted


def _is_finished(config: Config, summary: dict, checkpoints: list[Path]) -> bool:
    """Whether the run has its last checkpoint, its results and its model.

    Raises:
        ConfigError: it has done more steps than it is to do.
    """
    run_dir, num_steps = config.run_dir, config.trainer.num_steps
    if checkpoints and checkpoint_step(checkpoints[-1]) > num_steps:
        done = checkpoint_step(checkpoints[-1])
        raise ConfigError(
            f"trainer.num_steps: expected at least the {done} steps done in {run_dir}, "
            f"got {num_steps}"
        )
    is_written = summary.get("model_step") == num_steps
    return is_written and checkpoint_dir(run_dir, num_steps) in checkpoints


def _nothing_left(run_dir: Path, summary: dict, world: World) -> dict:
    if world.is_main:
        print(f"{run_dir} is finished, nothing is left to do")
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
    fitting = fit_lengths(config, _position_limit(config, model_path))
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


class Setup:
    """What training and evaluation share: data, tokenizer, policy, engine, rewarder."""

    def __init__(
        self, config: Config, model_path: Path | str, world: World, *, trains: bool = True
    ) -> None:
        self.config = config
        self.world = world
        _check_length(config, model_path)
        self.tokenizer = load_tokenizer(model_path, config.model.chat_template)
        self.data = load_problems(config, self.tokenizer, trains=trains)
        self.policy = load_policy(
            config, model_path, vocab_size=vocabulary_size(self.tokenizer), world=world
        )
        self.engine = make_engine(config, self.policy, self.tokenizer)
        self.rewarder = Rewarder(config.reward, answer_pattern=config.data.answer_pattern)

    def __enter__(self) -> "Setup":
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self.rewarder.close()
        if kind is None:  # else other ranks may be gone, and the process ends
            self.engine.close()

    def trainer(self) -> Trainer:
        """In the state of step 0; its configuration knows the number of steps.

        Raises:
            ConfigError: the method cannot learn from any problem, or micro-batches are too long.
        """
        check_micro_batches(self.policy.model, self.config.trainer.micro_batch_tokens)
        config, problems = _for_method(self.config, self.data.train)
        return Trainer(
            config,
            policy=self.policy,
            tokenizer=self.tokenizer,
            engine=self.engine,
            rewarder=self.rewarder,
            problems=problems,
            world=self.world,
        )

    def evaluate(self, interrupt: Interrupt, *, version: int) -> dict:
        """Accuracy of the current weights, known as `version`, on the held-out problems."""
        with (
            serving(self.engine, self.policy, version),
            interrupt.cancellable(at_once=not self.engine.is_collective),
        ):
            answers = answer(
                self.world.shard(self.data.held_out),
                self.engine,
                self.rewarder,
                self.tokenizer,
                config=self.config.eval,
                max_response_length=self.config.rollout.max_response_length,
                seed=self.config.seed * self.world.size + self.world.rank,
            )
        return summarize(self.world.all_gather(answers)) | {"grader": self.rewarder.info()}


def _position_limit(config: Config, model_path: Path | str) -> int | None:
    """The longest sequence that the model can take, in tokens; None: no limit."""
    text_config = load_model_config(config.model, model_path).get_text_config()
    return getattr(text_config, "max_position_embeddings", None)


def _check_length(config: Config, model_path: Path | str) -> None:
    limit = _position_limit(config, model_path)
    longest = max_sequence_length(config)
    if limit is not None and longest > limit:
        raise ConfigError(
            "rollout.max_response_length, eval.max_response_length: expected, with "
            f"data.max_prompt_tokens {config.data.max_prompt_tokens}, at most the {limit} tokens "
            f"that the model can take, got {longest} for both (model.max_position_embeddings "
            "overrides the model's limit)"
        )


def _loop(
    config: Config,
    setup: Setup,
    trainer: Trainer,
    logger: MetricsLogger | NoLogger,
    watch: Watch,
    interrupt: Interrupt,
    lock: RunLock,
) -> None:
    """Train to the last step; a checkpoint every n steps, at the end, and when stopped."""
    num_steps, every = config.trainer.num_steps, config.trainer.checkpoint_every
    saved = trainer.step_index
    with CheckpointWriter(
        config.run_dir,
        keep=config.trainer.keep_checkpoints,
        in_background=config.trainer.async_checkpoints,
        world=setup.world,
    ) as checkpoints:
        try:
            while trainer.step_index < num_steps:
                step = trainer.step_index
                with _profiled(config, step, setup.world):
                    metrics, sample = trainer.train_step(interrupt)
                logger.log(step, metrics)
                if warning := watch.of_step(metrics, sample):
                    logger.message(warning)
                if step % config.trainer.sample_every == 0:
                    logger.log_rollouts(step, [sample])
                done = trainer.step_index
                if done == num_steps or (every and done % every == 0):
                    saved = trainer.save(checkpoints)
                with interrupt.cancellable():
                    checkpoints.check()
                    lock.check()
                if config.eval.every and done % config.eval.every == 0 and done < num_steps:
                    results = setup.evaluate(interrupt, version=done)
                    logger.log(done, _eval_metrics(results), kind="eval")
        # They come between two updates: the weights are whole.
        except (Stopped, RewardError, LogProbGapError, EngineError):
            if trainer.step_index > saved:
                trainer.save(checkpoints)
            checkpoints.finish()
            raise


def _profiled(config: Config, step: int, world: World) -> AbstractContextManager:
    """A torch profiler around the steps that are to have one, on rank 0."""
    if step not in config.trainer.profile_steps or not world.is_main:
        return nullcontext()
    folder = config.run_dir / "profiles"
    folder.mkdir(exist_ok=True)
    trace = str(folder / f"step-{step:06d}.json.gz")
    return torch.profiler.profile(on_trace_ready=lambda p: p.export_chrome_trace(trace))


def _eval_metrics(results: dict) -> dict[str, float]:
    """The plain figures of an evaluation, named for the log."""
    return {f"eval/{name}": x for name, x in results.items() if isinstance(x, int | float)}


def _read_summary(run_dir: Path) -> dict:
    path = run_dir / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _write_summary(run_dir: Path, summary: dict, world: World) -> None:
    if not world.is_main:
        return
    partial = run_dir / f".partial-{SUMMARY_FILE}"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, run_dir / SUMMARY_FILE)
