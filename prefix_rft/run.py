"""A whole run: base, data, evaluation, the training loop, evaluation again, export, report."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

from prefix_rft.base_model import resolve_base
from prefix_rft.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    checkpoint_step,
    list_checkpoints,
    load_model_weights,
)
from prefix_rft.config import Config, load_config, save_config
from prefix_rft.data import load_problems
from prefix_rft.evaluate import evaluate
from prefix_rft.interrupt import Interrupt, Stopped
from prefix_rft.loading import export, load_model, load_tokenizer, resolve_autocast_dtype
from prefix_rft.metrics import MetricsLogger
from prefix_rft.model import Policy
from prefix_rft.reward import Rewarder, RewardError
from prefix_rft.rollout import make_engine
from prefix_rft.trainer import Trainer
from prefix_rft.view.report import write_report

CONFIG_FILE = "config.toml"
MODEL_FOLDER = "model"
SUMMARY_FILE = "summary.json"


def train(config: Config, *, resume: bool = False) -> dict:
    """Run `config` from its base to its report, in the folder `config.run_dir`.

    Args:
        resume: continue from the newest checkpoint of the folder, if there is one; a finished run
            is left as it is.
    Returns:
        the summary: "base" and "trained", each as `evaluate` returns it.
    Raises:
        UserError: something the user can put right.
        Stopped: SIGINT or SIGTERM came; the last whole step is in a checkpoint.
    """
    run_dir = config.run_dir
    summary = _read_summary(run_dir) if resume else {}
    checkpoints = list_checkpoints(run_dir) if resume else []
    last = checkpoint_dir(run_dir, config.trainer.num_steps)
    if "trained" in summary and last in checkpoints:
        return summary
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / CONFIG_FILE)

    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        with interrupt.abandonable():
            setup = stack.enter_context(Setup(config, resolve_base(config)))
        logger = stack.enter_context(
            MetricsLogger(
                run_dir,
                config.log,
                num_steps=config.trainer.num_steps,
                start_step=checkpoint_step(checkpoints[-1]) if checkpoints else 0,
            )
        )
        for report in setup.data.reports:
            logger.message(str(report))
        if "base" not in summary:
            logger.message("evaluating the base model")
            with interrupt.abandonable():
                summary = {"base": setup.evaluate()}
            _write_summary(run_dir, summary)
        trainer = setup.trainer()
        if checkpoints:
            logger.message(f"resuming from {checkpoints[-1]}")
            trainer.restore(checkpoints[-1])
        else:
            logger.log(0, _eval_metrics(summary["base"]), kind="eval")
        _loop(config, setup, trainer, logger, interrupt)
        logger.message("evaluating the trained model")
        with interrupt.abandonable():
            trained = setup.evaluate()
        logger.log(trainer.step_index, _eval_metrics(trained), kind="eval")
    export(setup.policy.model, setup.tokenizer, run_dir / MODEL_FOLDER)
    summary["trained"] = trained
    _write_summary(run_dir, summary)
    write_report(run_dir)
    return summary


def evaluate_model(config: Config, model_path: str) -> dict:
    """Results of the model at `model_path`, a folder or hub id, on the held-out problems."""
    with Setup(config, model_path) as setup:
        return setup.evaluate()


def export_checkpoint(run_dir: Path, step: int | None, folder: Path) -> None:
    """Write the model of a run's checkpoint in Hugging Face format.

    Args:
        step: steps done at the checkpoint; None: the newest.
    Raises:
        CheckpointError: there is none such, or it is damaged.
    """
    checkpoints = {checkpoint_step(path): path for path in list_checkpoints(run_dir)}
    if not checkpoints or (step is not None and step not in checkpoints):
        raise CheckpointError(
            f"{run_dir}: expected a checkpoint of step {'any' if step is None else step}, "
            f"got {sorted(checkpoints) or 'none'}"
        )
    config = load_config(run_dir / CONFIG_FILE)
    base = resolve_base(config)
    model = load_model(config.model, base)
    load_model_weights(checkpoints[max(checkpoints) if step is None else step], model)
    export(model, load_tokenizer(base, config.model.chat_template), folder)


class Setup:
    """What training and evaluation share: data, tokenizer, policy, engine, rewarder."""

    def __init__(self, config: Config, model_path: Path | str) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(model_path, config.model.chat_template)
        self.data = load_problems(config, self.tokenizer)
        model = load_model(config.model, model_path)
        self.policy = Policy(
            model,
            temperature=config.rollout.temperature,
            vocab_size=len(self.tokenizer),
            autocast_dtype=resolve_autocast_dtype(config.model),
        )
        self.engine = make_engine(config, model, self.tokenizer)
        self.rewarder = Rewarder(config.reward, answer_pattern=config.data.answer_pattern)

    def __enter__(self) -> "Setup":
        return self

    def __exit__(self, *exc: object) -> None:
        self.rewarder.close()

    def trainer(self) -> Trainer:
        return Trainer(
            self.config,
            policy=self.policy,
            tokenizer=self.tokenizer,
            engine=self.engine,
            rewarder=self.rewarder,
            problems=self.data.train,
        )

    def evaluate(self) -> dict:
        """Accuracy of the current weights on the held-out problems."""
        return evaluate(
            self.data.held_out,
            self.engine,
            self.rewarder,
            self.tokenizer,
            config=self.config.eval,
            max_response_length=self.config.rollout.max_response_length,
            seed=self.config.seed,
        )


def _loop(
    config: Config,
    setup: Setup,
    trainer: Trainer,
    logger: MetricsLogger,
    interrupt: Interrupt,
) -> None:
    """Train to the last step; a checkpoint every n steps, at the end, and when stopped."""
    num_steps, every = config.trainer.num_steps, config.trainer.checkpoint_every
    saved = trainer.step_index
    try:
        while trainer.step_index < num_steps:
            step = trainer.step_index
            metrics, sample = trainer.train_step(interrupt)
            logger.log(step, metrics)
            if step % config.trainer.sample_every == 0:
                logger.log_rollouts(step, [sample])
            done = trainer.step_index
            if done == num_steps or (every and done % every == 0):
                saved = trainer.save(config.run_dir)
            if config.eval.every and done % config.eval.every == 0 and done < num_steps:
                with interrupt.abandonable():
                    logger.log(done, _eval_metrics(setup.evaluate()), kind="eval")
    except (Stopped, RewardError):  # they come between two updates: the weights are whole
        if trainer.step_index > saved:
            trainer.save(config.run_dir)
        raise


def _eval_metrics(results: dict) -> dict[str, float]:
    """The plain figures of an evaluation, named for the log."""
    return {f"eval/{name}": x for name, x in results.items() if isinstance(x, int | float)}


def _read_summary(run_dir: Path) -> dict:
    path = run_dir / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _write_summary(run_dir: Path, summary: dict) -> None:
    partial = run_dir / f".partial-{SUMMARY_FILE}"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, run_dir / SUMMARY_FILE)
