"""What a run is set up from: data, tokenizer, policy, engine, rewarder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from prefix_rft.checks import ConfigError
from prefix_rft.config import Config, make_method
from prefix_rft.data import Problems, load_problems
from prefix_rft.data_types import Problem
from prefix_rft.evaluate import answer, summarize, training_suites, write_outcomes
from prefix_rft.methods import Method, find_method
from prefix_rft.model import (
    World,
    check_micro_batches,
    end_of_response_id,
    load_model_config,
    load_policy,
    load_tokenizer,
    vocabulary_size,
)
from prefix_rft.reward import Rewarder
from prefix_rft.rollout import make_engine, max_sequence_length, serving
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.reference import Reference, check_reference, load_reference
from prefix_rft.train.trainer import Trainer


class Setup:
    """What training and evaluation share: data, tokenizer, policy, engine, rewarder."""

    def __init__(
        self, config: Config, model_path: Path | str, world: World, *, trains: bool = True
    ) -> None:
        self.config = config
        self.model_path = model_path
        self.world = world
        check_length(config, model_path)
        self.tokenizer = load_tokenizer(model_path, config.model.chat_template)
        eos_token_id = end_of_response_id(self.tokenizer)
        method = make_method(config, eos_token_id=eos_token_id)
        self.uses_reference = trains and method.uses_reference
        if self.uses_reference:
            check_reference(config, self.tokenizer)
        self.data = load_problems(config, self.tokenizer, trains=trains)
        self.suites = training_suites(config, self.tokenizer, self.data.held_out)
        self.policy = load_policy(
            config, model_path, vocab_size=vocabulary_size(self.tokenizer), world=world
        )
        self.engine = make_engine(config, self.policy, self.tokenizer)
        self.rewarder = Rewarder(config.reward, answer_pattern=config.data.answer_pattern)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self.rewarder.close()
        if kind is None:  # else other ranks may be gone, and the process ends
            self.engine.close()

    def trainer(self) -> Trainer:
        """In the state of step 0; its configuration knows the number of steps.

        Raises:
            ConfigError: the method cannot learn from these problems, or micro-batches are too long.
        """
        check_micro_batches(self.policy.model, self.config.trainer.micro_batch_tokens)
        config, problems = for_method(self.config, self.data.train)
        return Trainer(
            config,
            policy=self.policy,
            tokenizer=self.tokenizer,
            engine=self.engine,
            rewarder=self.rewarder,
            problems=problems,
            reference=self.reference() if self.uses_reference else None,
            world=self.world,
        )

    def reference(self) -> Reference:
        return load_reference(
            self.config,
            self.model_path,
            self.policy,
            vocab_size=vocabulary_size(self.tokenizer),
            world=self.world,
        )

    def evaluate(self, interrupt: Interrupt, *, version: int, outcomes: Path | None = None) -> dict:
        """Accuracy of the current weights, known as `version`, on the held-out problems.

        Args:
            outcomes: a file for what came of each problem, written by rank 0.
        """
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
            suites = self.suites.evaluate(self.engine, self.world) if self.suites.jobs else {}
        answers = self.world.all_gather(answers)
        if outcomes is not None and self.world.is_main:
            write_outcomes(outcomes, self.data.held_out, answers)
        return summarize(answers) | suites | {"grader": self.rewarder.info()}


def for_method(config: Config, problems: Sequence[Problem]) -> tuple[Config, Problems]:
    """The problems that the method learns from, and the configuration with the steps they take.

    Raises:
        ConfigError: there are none, or none has the demonstration that the method needs.
    """
    problems, method = Problems.of(problems), find_method(config.method.name)
    if method.needs_demonstrations and not problems.num_demonstrations:
        raise ConfigError(
            f"data.path: expected demonstrations, which {method.name} learns from, got none among "
            f"{len(problems)} problems"
        )
    takes_all = getattr(method.accepts, "__func__", None) is Method.accepts.__func__
    accepted = problems if takes_all else problems.accepted(method.accepts)
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


def position_limit(config: Config, model_path: Path | str) -> int | None:
    """The longest sequence that the model can take, in tokens; None: no limit."""
    text_config = load_model_config(config.model, model_path).get_text_config()
    return getattr(text_config, "max_position_embeddings", None)


def check_length(config: Config, model_path: Path | str) -> None:
    limit = position_limit(config, model_path)
    longest = max_sequence_length(config)
    if limit is not None and longest > limit:
        raise ConfigError(
            "rollout.max_response_length, eval.max_response_length: expected, with "
            f"data.max_prompt_tokens {config.data.max_prompt_tokens}, at most the {limit} tokens "
            f"that the model can take, got {longest} for both (model.max_position_embeddings "
            "overrides the model's limit)"
        )
